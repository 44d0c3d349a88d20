"""The attention module that stands in a loaded model's attention places.

The library's own seams were looked at first. Its attention interface and cache class begin after
the layer has rotated Q and K, its hook for the rotation needs the `kernels` package and sees
neither V nor the slots: going through them means a second pass over K, or a rotation that is
undone. So the attention instances of the one loaded model are replaced; no class and no global of
the library is touched, and everything else in the model stays its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropool.engine.attention import paged_attention
from ropool.engine.spec import KVRow
from ropool.engine.step import Step
from ropool.ops import rope_store_kv_
from ropool.rotary import StackedRotary


@dataclass(frozen=True, kw_only=True)
class AttentionParts:
    """What `PooledAttention` takes over from an attention module, whatever that calls it."""

    qkv_proj: nn.Linear
    """With biases where the module has them."""
    qkv_by_head: bool = False
    """The projection gives Q, K and V of each head side by side, instead of all heads of Q, then
    those of K, then those of V."""
    o_proj: nn.Linear
    heads_q: int
    heads_kv: int
    head_dim: int
    scale: float
    """Of the scores, before the softmax."""
    window: int | None
    """Tokens that the sliding window holds, the query's own included; `None`: all."""
    q_norm_weight: Tensor | None = None
    """`[D]`, of the RMSNorm before the rotation; `None`: no norm."""
    k_norm_weight: Tensor | None = None
    norm_eps: float = 0.0
    sinks: Tensor | None = None
    """`[Hq]`, see `paged_attention`."""


class PooledAttention(nn.Module):
    """Attention whose QKV projection is one matrix and whose K and V go straight into the pool.

    Between projection and attention stands one `rope_store_kv_` call, which normalises, rotates and
    stores.
    """

    def __init__(self, parts: AttentionParts, layer: int, rotary: StackedRotary) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary
        self.rope_options: dict[str, Any] = dict(rotary.options)
        self.row = KVRow(parts.heads_kv, parts.head_dim)
        self.window = parts.window
        self.scale = parts.scale
        self.qkv_by_head = parts.qkv_by_head
        self.sinks = parts.sinks
        self.heads = [parts.heads_q, parts.heads_kv, parts.heads_kv]
        self.qkv_proj = parts.qkv_proj
        self.o_proj = parts.o_proj
        self.q_norm_weight, self.k_norm_weight = parts.q_norm_weight, parts.k_norm_weight
        if parts.q_norm_weight is not None or parts.k_norm_weight is not None:
            self.rope_options["norm_eps"] = parts.norm_eps

    def forward(self, hidden_states: Tensor, step: Step, **_: object) -> tuple[Tensor, None]:
        """`hidden_states` `[1, T, hidden]`; the decoder layer passes `step` through and ignores the
        second result."""
        q, k, v = self._split(self.qkv_proj(hidden_states[0]))
        cache = step.layers[self.layer]
        self.rotary.claim(step, self.layer, "rope_store_kv_")
        rope_store_kv_(
            q,
            k,
            v,
            cache.k,
            cache.v,
            self.rotary.cos_sin_cache,
            step.positions,
            step.slots,
            q_norm_weight=self.q_norm_weight,
            k_norm_weight=self.k_norm_weight,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            window_slot_map=cache.window_slot_map,
            **self.rope_options,
        )
        out = paged_attention(q, step, self.layer, self.scale, self.sinks)
        return self.o_proj(out.flatten(1))[None], None

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """The heads of Q, K and V, views of the projection's result."""
        heads = qkv.unflatten(-1, (-1, self.row.head_dim))
        if self.qkv_by_head:
            return heads.unflatten(1, (-1, 3)).unbind(2)
        return heads.split(self.heads, dim=1)


def plain_norm(norm: Any) -> tuple[Tensor, float]:
    """What an RMSNorm multiplies by, and what it adds to the mean square."""
    return norm.weight, norm.variance_epsilon


def separate_projections(
    original: Any,
    window: int | None,
    norm: Callable[[Any], tuple[Tensor, float]] = plain_norm,
) -> AttentionParts:
    """The parts of a module with `q_proj`, `k_proj`, `v_proj`, `o_proj` and, perhaps, `q_norm` and
    `k_norm`, which `norm` reads, and `sinks`."""
    projections = (original.q_proj, original.k_proj, original.v_proj)
    head_dim: int = original.head_dim
    norms = [getattr(original, name, None) for name in ("q_norm", "k_norm")]
    (q_norm_weight, norm_eps), (k_norm_weight, _) = (
        (None, 0.0) if module is None else norm(module) for module in norms
    )
    return AttentionParts(
        qkv_proj=pack(projections),
        o_proj=original.o_proj,
        heads_q=projections[0].out_features // head_dim,
        heads_kv=projections[1].out_features // head_dim,
        head_dim=head_dim,
        scale=original.scaling,
        window=window,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        norm_eps=norm_eps,
        sinks=getattr(original, "sinks", None),
    )


@torch.no_grad()
def pack(projections: tuple[nn.Linear, ...]) -> nn.Linear:
    """One projection that computes the outputs of all, side by side."""
    first = projections[0]
    packed = nn.Linear(
        first.in_features,
        sum(projection.out_features for projection in projections),
        bias=first.bias is not None,
        device="meta",
    )
    weight = torch.cat([p.weight for p in projections])
    packed.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        packed.bias = nn.Parameter(torch.cat([p.bias for p in projections]), requires_grad=False)
    return packed
