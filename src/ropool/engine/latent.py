"""Attention over the latent rows of the pool, by PyTorch's SDPA.

The projection that would make a head's K and V of a latent can come in two places. Absorbed, in the
words of DeepSeek-V2 (arXiv:2405.04434, section 2.1.2), it is multiplied into the query and the
result: a latent row is then the K of every head, its first `L` values are their V, and no K or V of
a head is computed. With many queries it is less work to expand what they read, chunk by chunk of a
prompt; the pool holds latent rows either way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ropool.engine.attention import attend
from ropool.engine.pools import LatentCache
from ropool.engine.spec import LatentRow
from ropool.engine.step import Step
from ropool.kvcache.mla import DS_MLA_DIMS

EXPANDED_ELEMENTS = 1 << 24
"""Of K and V that are expanded at a time: heads take turns where all would be more."""


class LatentHeads(NamedTuple):
    """What the heads of a layer make of a latent row: `N + R` wide K, and `V` wide V."""

    row: LatentRow
    nope_dim: int
    """`N`, the part of K that is made of the latent."""
    kv_weight: Tensor
    """`[Hq, N + V, L]`: makes that part of K, and V, of a latent."""
    scale: float
    """Of the scores, before the softmax."""

    @property
    def key_dim(self) -> int:
        return self.nope_dim + self.row.rope_dim

    @property
    def value_dim(self) -> int:
        return self.kv_weight.shape[1] - self.nope_dim


def latent_attention(q: Tensor, step: Step, layer: int, heads: LatentHeads) -> Tensor:
    """Return the attention of the rotated queries `q` `[T, Hq, N + R]` over what the latent rows of
    `layer` stand for, `[T, Hq, V]`.

    Rows are gathered and masked as in `paged_attention`; they must not hold NaN.
    """
    cache = step.latent_layers[layer]
    outputs = []
    for group in step.groups[cache.window_slot_map is not None]:
        part = q[group.first : group.last]
        rows = _gather(cache, group.pages, step.workspace[0]).flatten(0, 1)
        if group.mask is None:
            rows = rows[: len(part)]
        if len(part) > group.requests and _expanding_pays(len(part), len(rows), heads):
            outputs.append(_expanded(part, rows, group.mask, heads))
        else:
            shared = rows.view(group.requests, 1, -1, rows.shape[-1])
            outputs.append(_absorbed(part, shared, group.mask, heads))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _expanding_pays(queries: int, keys: int, heads: LatentHeads) -> bool:
    """Whether expanding takes fewer multiplications: those of one head, for one request."""
    if heads.value_dim > heads.key_dim:
        return False  # SDPA's fast kernel would not take it
    per_latent = heads.kv_weight[0].numel()
    absorbed = queries * per_latent + queries * keys * 2 * sum(heads.row)
    return keys * per_latent + queries * keys * 2 * heads.key_dim < absorbed


def _absorbed(q: Tensor, rows: Tensor, mask: Tensor | None, heads: LatentHeads) -> Tensor:
    """Attention of `q` over `rows` `[N, 1, keys, L + R]`, one head that all share."""
    latent_dim, nope_dim, weight = heads.row.latent_dim, heads.nope_dim, heads.kv_weight
    absorbed = q.new_empty(*q.shape[:2], rows.shape[-1])
    torch.bmm(
        q[..., :nope_dim].transpose(0, 1),
        weight[:, :nope_dim],
        out=absorbed[..., :latent_dim].transpose(0, 1),
    )
    absorbed[..., latent_dim:] = q[..., nope_dim:]
    # K and V have to be as wide as each other for SDPA's fast kernel: the rope part of V is
    # computed and dropped.
    out = attend(absorbed, rows, rows, mask, heads.scale, None)[..., :latent_dim]
    return torch.bmm(out.transpose(0, 1), weight[:, nope_dim:].transpose(1, 2)).transpose(0, 1)


def _expanded(q: Tensor, rows: Tensor, mask: Tensor | None, heads: LatentHeads) -> Tensor:
    """Attention of `q` of one request over K and V made of `rows` `[keys, L + R]`."""
    latent, rope = rows.split(list(heads.row), -1)
    at_once = max(EXPANDED_ELEMENTS // (len(rows) * 2 * heads.key_dim), 1)
    outputs = []
    for part, weight in zip(q.split(at_once, 1), heads.kv_weight.split(at_once), strict=True):
        kv = F.linear(latent, weight.flatten(0, 1)).unflatten(-1, (len(weight), -1))
        shared = rope[:, None].expand(-1, len(weight), -1)
        k = torch.cat([kv[..., : heads.nope_dim], shared], -1)
        # As wide as K, for SDPA's fast kernel.
        v = F.pad(kv[..., heads.nope_dim :], (0, heads.key_dim - heads.value_dim))
        k, v = (tensor.transpose(0, 1)[None] for tensor in (k, v))
        outputs.append(attend(part, k, v, mask, heads.scale, None)[..., : heads.value_dim])
    return torch.cat(outputs, 1)


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
