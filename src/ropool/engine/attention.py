"""Attention over the pages of the pool, by PyTorch's SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ropool.engine.step import Step


def paged_attention(q: Tensor, step: Step, layer: int, scale: float) -> Tensor:
    """Return the attention of the rotated queries `q` `[T, Hq, D]` over what the pool of `layer`
    holds, `[T, Hq, D]`.

    K and V of a group of requests are gathered page by page, since SDPA takes no page table. Rows
    of the pool that are not written yet are masked; they must not hold NaN.
    """
    cache = step.layers[layer]
    heads_q, head_dim = q.shape[1:]
    heads_kv = cache.k.shape[2]
    outputs = []
    for group in step.groups[cache.window_slot_map is not None]:
        shape = (group.requests, -1, heads_kv, head_dim)
        k = _gather(cache.k, group.pages, cache.k_scale, step.workspace[0]).view(shape)
        v = _gather(cache.v, group.pages, cache.v_scale, step.workspace[1]).view(shape)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        rows = q[group.first : group.last]
        queries = len(rows) // group.requests
        if queries == 1:
            # The query heads of a KV head stand as its queries: no SDPA kernel has to know grouped
            # heads.
            packed = rows.view(group.requests, heads_kv, -1, head_dim)
            out = F.scaled_dot_product_attention(packed, k, v, attn_mask=group.mask, scale=scale)
        else:
            if group.mask is None:
                k, v = k[:, :, :queries], v[:, :, :queries]
            out = F.scaled_dot_product_attention(
                rows.view(group.requests, queries, heads_q, head_dim).transpose(1, 2),
                k,
                v,
                attn_mask=group.mask,
                is_causal=group.mask is None,
                scale=scale,
                enable_gqa=heads_q != heads_kv,
            ).transpose(1, 2)
        outputs.append(out.reshape(len(rows), heads_q, head_dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _gather(pool: Tensor, pages: Tensor, scale: Tensor | None, workspace: Tensor) -> Tensor:
    """Pages of a pool tensor, `[N * M, B, Hk, D]`, in the dtype of the workspace, which they
    overwrite."""
    out = workspace[: len(pages)]
    if pool.dtype == out.dtype:
        return torch.index_select(pool, 0, pages, out=out)
    # index_select does not know fp8.
    stored = pool.view(torch.uint8).index_select(0, pages).view(pool.dtype)
    out.copy_(stored)
    return out if scale is None else out.mul_(scale.reshape(-1, 1))
