"""The attention module that stands in a loaded `mlx-lm` model's `self_attn` places.

Projections, norms and the scale stay the model's own; between projection and attention stands one
kernel, and attention reads the pool.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ropool.mlx.context import AttentionGroup, BatchedDecodeContext, LayerContext
from ropool.mlx.linear import packed
from ropool.mlx.rotation import Rotation
from ropool.rotary import RotaryEmbedding

_QKV = ("qkv_proj", "q_proj", "k_proj", "v_proj")


class PooledAttention(nn.Module):
    """Takes the place of `original`, an attention module of a covered family, and takes over its
    parts. Plain projections of Q, K and V become one."""

    def __init__(self, original: Any, rotation: Rotation) -> None:
        super().__init__()
        for name in ("q_norm", "k_norm", "o_proj"):
            if name in original:
                setattr(self, name, original[name])
        projections = [original[name] for name in _QKV if name in original]
        together = projections[0] if "qkv_proj" in original else packed(projections)
        if together is not None:
            self.qkv_proj = together
        else:
            self.q_proj, self.k_proj, self.v_proj = projections
        self.scale: float = original.scale
        self._rotation = rotation
        self._heads = (original.n_heads, original.n_kv_heads)
        self._head_dim = head_dim_of(original)

    def __call__(self, x: mx.array, mask: None = None, cache: LayerContext | None = None) -> Any:
        """`x` `[1, T, hidden]`; `cache` leads to the step."""
        assert cache is not None and cache.step is not None
        step = cache.step
        q, k, v = self._project(x[0])
        windowed, layer = step.cache.places[cache.layer]
        pool, slots = step.cache.mlx_pool(windowed), step.slots[windowed]
        kernels = step.kernels
        RotaryEmbedding.claim(step, cache.layer, "rope_store_kv_")
        if kernels.rotates:
            q, _, pool.k[layer], pool.v[layer] = kernels.kernels.rope(
                q, k, v, pool.k[layer], pool.v[layer], self._rotation, step.positions, slots
            )
        else:
            q, k = (self._rotation.apply(part, step.positions) for part in (q, k))
            pool.k[layer], pool.v[layer] = kernels.kernels.kv_store(
                k, v, pool.k[layer], pool.v[layer], slots
            )
        out = paged_attention(q, pool.k[layer], pool.v[layer], step, windowed, scale=self.scale)
        return self.o_proj(out.reshape(1, len(out), -1))

    def _project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """`[T, Hq, D]` and twice `[T, Hk, D]`, normalised where the model does that."""
        (heads_q, heads_kv), dim = self._heads, self._head_dim
        if "qkv_proj" in self:
            heads = self.qkv_proj(x).reshape(len(x), -1, dim)
            q, k, v = mx.split(heads, [heads_q, heads_q + heads_kv], axis=1)
        else:
            q, k, v = (
                projection(x).reshape(len(x), -1, dim)
                for projection in (self.q_proj, self.k_proj, self.v_proj)
            )
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def head_dim_of(attention: Any) -> int:
    """`D` of an attention module."""
    if "qkv_proj" in attention:
        heads = attention.n_heads + 2 * attention.n_kv_heads
        return int(attention.qkv_proj.weight.shape[0]) // int(heads)
    return int(attention.q_proj.weight.shape[0]) // int(attention.n_heads)


def paged_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    step: BatchedDecodeContext,
    windowed: bool,
    *,
    scale: float,
) -> mx.array:
    """The attention of the rotated queries `q` `[T, Hq, D]` over what the pool holds,
    `[T, Hq, D]`."""
    outputs = [
        _group_attention(q[group.first : group.last], k_pool, v_pool, group, scale)
        for group in step.groups[windowed]
    ]
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _group_attention(
    q: mx.array, k_pool: mx.array, v_pool: mx.array, group: AttentionGroup, scale: float
) -> mx.array:
    rows, heads, dim = q.shape
    shape = (group.requests, -1, *k_pool.shape[2:])
    keys, values = (
        pool[group.pages].reshape(shape)[:, : group.keys].transpose(0, 2, 1, 3)
        for pool in (k_pool, v_pool)
    )
    queries = q.reshape(group.requests, -1, heads, dim).transpose(0, 2, 1, 3)
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=group.mask)
    return out.transpose(0, 2, 1, 3).reshape(rows, heads, dim)
