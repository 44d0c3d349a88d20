"""Attention over the latent rows of the pool, by PyTorch's SDPA.

Absorbed, in the words of DeepSeek-V2 (arXiv:2405.04434, section 2.1.2): the matrix that would make
a head's K of the latent is multiplied into its query, and the one that would make its V into the
result. A latent row is then the K of every head, and its first `L` values are their V: one shared
head, and no K or V of any other is ever computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropool.engine.attention import attend
from ropool.engine.pools import LatentCache
from ropool.engine.step import Step
from ropool.kvcache.mla import DS_MLA_DIMS


def latent_attention(q: Tensor, step: Step, layer: int, scale: float, latent_dim: int) -> Tensor:
    """Return the attention of the queries `q` `[T, Hq, L + R]` over the latent rows that the pool
    of `layer` holds, `[T, Hq, L]`.

    The first `L` values of a query are absorbed, the others rotated. Rows are gathered and masked
    as those of `paged_attention`; they must not hold NaN.
    """
    cache = step.latent_layers[layer]
    outputs = []
    for group in step.groups[cache.window_slot_map is not None]:
        rows = _gather(cache, group.pages, step.workspace[0])
        rows = rows.view(group.requests, 1, -1, q.shape[-1])
        # K and V have to be as wide as each other for SDPA's fast kernel: the rope part of V is
        # computed and dropped.
        outputs.append(attend(q[group.first : group.last], rows, rows, group.mask, scale, None))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out[..., :latent_dim]


def _gather(cache: LatentCache, pages: Tensor, workspace: Tensor) -> Tensor:
    """Pages of latent rows, `[N * M, B, L + R]`, in the dtype of the workspace, which they
    overwrite."""
    out = workspace[: len(pages)]
    if cache.rows.dtype == out.dtype:
        return torch.index_select(cache.rows, 0, pages, out=out)
    # index_select does not know fp8.
    stored = cache.rows.view(torch.uint8).index_select(0, pages)
    if cache.rows.dtype != torch.uint8:
        out.copy_(stored.view(cache.rows.dtype))
        return out if cache.scale is None else out.mul_(cache.scale)
    # 656 bytes: the latents, a scale for each 128 of them, the rope values.
    latent_dim, _ = DS_MLA_DIMS
    latent = stored[..., :latent_dim].view(torch.float8_e4m3fn).float()
    scales = stored[..., latent_dim : latent_dim + 16].view(torch.float32)
    tiles = latent.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)
    out[..., :latent_dim].copy_(tiles.flatten(-2))
    out[..., latent_dim:].copy_(stored[..., latent_dim + 16 :].view(torch.bfloat16))
    return out
