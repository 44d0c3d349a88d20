"""Attention over the pages of the pool, by PyTorch's SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ropool.engine.step import Step


def paged_attention(
    q: Tensor, step: Step, layer: int, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Return the attention of the rotated queries `q` `[T, Hq, D]` over what the pool of `layer`
    holds, `[T, Hq, D]`.

    K and V of a group of requests are gathered page by page, since SDPA takes no page table. Rows
    of the pool that are not written yet are masked; they must not hold NaN.

    Args:
        sinks: `[Hq]`, a logit of each head that takes its part of the softmax and has no value
            (arXiv:2508.10925, section 2.2).
    """
    cache = step.layers[layer]
    heads_kv, head_dim = cache.k.shape[2:]
    outputs = []
    for group in step.groups[cache.window_slot_map is not None]:
        shape = (group.requests, -1, heads_kv, head_dim)
        k = _gather(cache.k, group.pages, cache.k_scale, step.workspace[0]).view(shape)
        v = _gather(cache.v, group.pages, cache.v_scale, step.workspace[1]).view(shape)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        outputs.append(attend(q[group.first : group.last], k, v, group.mask, scale, sinks))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend(
    rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None
) -> Tensor:
    """Attention of a group's queries `rows` `[N * queries, Hq, D]` over `k` and `v` `[N, Hk, keys,
    D]`, shaped like `rows`. Its mask is that of the `AttentionGroup`; `sinks` as above."""
    requests, heads_kv = k.shape[:2]
    queries, heads_q, head_dim = len(rows) // requests, *rows.shape[1:]
    if sinks is not None:
        return _attention_with_sinks(rows, k, v, mask, sinks, scale)
    if queries == 1:
        # The query heads of a KV head stand as its queries: no SDPA kernel has to know grouped
        # heads.
        packed = rows.view(requests, heads_kv, -1, head_dim)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
    else:
        if mask is None:
            k, v = k[:, :, :queries], v[:, :, :queries]
        out = F.scaled_dot_product_attention(
            rows.view(requests, queries, heads_q, head_dim).transpose(1, 2),
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=heads_q != heads_kv,
        ).transpose(1, 2)
    return out.reshape(rows.shape)


def _attention_with_sinks(
    rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor, scale: float
) -> Tensor:
    """Attention of `rows` `[N * queries, Hq, D]` over `k` and `v` `[N, Hk, keys, D]`, with `sinks`
    `[Hq]`; SDPA has no such argument. Computed in float32 and rounded once."""
    requests, heads_kv = k.shape[:2]
    queries, heads_q, head_dim = len(rows) // requests, *rows.shape[1:]
    if mask is None:
        k, v = k[:, :, :queries], v[:, :, :queries]
        mask = rows.new_full((1, 1, queries, queries), float("-inf")).triu_(1)
    # `[N, Hk, Hq / Hk, queries, D]`: the query heads of a KV head side by side.
    grouped = rows.view(requests, queries, heads_kv, -1, head_dim).permute(0, 2, 3, 1, 4)
    sinks = sinks.float().view(heads_kv, -1, 1, 1)
    out = torch.empty_like(grouped)
    # One KV head at a time: of several requests the product would copy the strided K and V, and the
    # scores of a long prompt are large. All at once for a single token.
    count = heads_kv if len(rows) == 1 else 1
    for first in range(0, heads_kv, count):
        heads = slice(first, first + count)
        shape = grouped[:, heads].shape[:-1]
        packed = grouped[:, heads].flatten(2, 3).float()
        scores = (packed @ k[:, heads].float().transpose(2, 3)).view(*shape, -1)
        scores = torch.add(mask[:, None], scores, alpha=scale)
        weights = torch.cat([scores, sinks[heads].expand(*shape, 1)], -1).softmax(-1)[..., :-1]
        out[:, heads] = (weights.flatten(2, 3) @ v[:, heads].float()).view(*shape, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(len(rows), heads_q, head_dim)


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
