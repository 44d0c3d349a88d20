"""The attention module that stands in a loaded model's `self_attn` places.

The library's own seams were looked at first. Its attention interface and cache class begin after
the layer has rotated Q and K, its hook for the rotation needs the `kernels` package and sees
neither V nor the slots: going through them means a second pass over K, or a rotation that is
undone. So the `self_attn` instances of the one loaded model are replaced; no class and no global of
the library is touched, and everything else in the model stays its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ropool.engine.attention import paged_attention
from ropool.engine.step import Step
from ropool.ops import rope_store_kv_
from ropool.rotary import RotaryEmbedding


class PooledAttention(nn.Module):
    """Attention whose QKV projection is one matrix and whose K and V go straight into the pool.

    Takes over the weights of `original`, an attention module of a covered family: biases, QK-norm
    and output projection included. Between projection and attention stands one `rope_store_kv_`
    call, which normalises, rotates and stores.
    """

    def __init__(self, original: Any, layer: int, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary
        self.rope_options: dict[str, Any] = dict(rotary.options)
        self.head_dim: int = original.head_dim
        self.scale: float = original.scaling
        projections = (original.q_proj, original.k_proj, original.v_proj)
        self.heads = [projection.out_features // self.head_dim for projection in projections]
        self.qkv_proj = _pack(projections)
        self.o_proj: nn.Linear = original.o_proj
        norms = getattr(original, "q_norm", None), getattr(original, "k_norm", None)
        self.q_norm_weight, self.k_norm_weight = (norm and norm.weight for norm in norms)
        if norms[0] is not None:
            self.rope_options["norm_eps"] = norms[0].variance_epsilon

    def forward(self, hidden_states: Tensor, step: Step, **_: object) -> tuple[Tensor, None]:
        """`hidden_states` `[T, hidden]`; the decoder layer passes `step` through and ignores the
        second result."""
        qkv = self.qkv_proj(hidden_states).view(len(hidden_states), -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=1)
        cache = step.layers[self.layer]
        self.rotary.claim(step, self.layer)
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
        out = paged_attention(q, step, self.layer, self.scale)
        return self.o_proj(out.flatten(1)), None


@torch.no_grad()
def _pack(projections: tuple[nn.Linear, ...]) -> nn.Linear:
    """One projection that computes the outputs of all, side by side."""
    first = projections[0]
    packed = nn.Linear(
        first.in_features,
        sum(projection.out_features for projection in projections),
        bias=first.bias is not None,
        device="meta",
    )
    weight = torch.cat([p.weight for p in projections])
    if weight.device.type == "cpu":
        # Laid out as the product reads it: a quarter less time for the few rows of a decode step.
        weight = weight.t().contiguous().t()
    packed.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        packed.bias = nn.Parameter(torch.cat([p.bias for p in projections]), requires_grad=False)
    return packed
