"""The module that stands in the attention places of models with multi-head latent attention (MLA,
DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ropool.engine.latent import latent_attention
from ropool.engine.spec import LatentRow
from ropool.engine.step import Step
from ropool.ops import rope_store_mla_
from ropool.rotary import StackedRotary


class LatentAttention(nn.Module):
    """Attention that keeps one latent row a token in the pool, whatever the number of heads.

    Takes over the weights of `original`, an attention module of DeepSeek-V2 or V3. Between
    projections and attention stands one `rope_store_mla_` call, which rotates the rope part of Q
    and K and writes the row. K and V of the heads are never computed: their projection is absorbed.
    """

    window: int | None = None

    def __init__(self, original: Any, layer: int, rotary: StackedRotary) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary
        self.rope_options: dict[str, Any] = dict(rotary.options)
        self.row = LatentRow(original.kv_lora_rank, original.qk_rope_head_dim)
        self.scale: float = original.scaling
        self.heads: int = original.num_heads
        self.q_dims = [original.qk_nope_head_dim, original.qk_rope_head_dim]
        # `[Hq, ..., L]`: what makes K (without its rope part) and V of a latent.
        weights = original.kv_b_proj.weight.detach().unflatten(0, (self.heads, -1))
        parts = weights.split([original.qk_nope_head_dim, original.v_head_dim], 1)
        self.k_weight, self.v_weight = (
            nn.Parameter(part.contiguous(), requires_grad=False) for part in parts
        )
        if original.q_lora_rank is None:
            self.q_proj = original.q_proj
        else:
            projections = original.q_a_proj, original.q_a_layernorm, original.q_b_proj
            self.q_proj = nn.Sequential(*projections)
        self.kv_a_proj: nn.Linear = original.kv_a_proj_with_mqa
        self.kv_a_norm: nn.Module = original.kv_a_layernorm
        self.o_proj: nn.Linear = original.o_proj

    def forward(self, hidden_states: Tensor, step: Step, **_: object) -> tuple[Tensor, None]:
        """`hidden_states` `[1, T, hidden]`; the decoder layer passes `step` through and ignores the
        second result."""
        hidden = hidden_states[0]
        latent_dim, rope_dim = self.row
        q_nope, q_rope = self.q_proj(hidden).unflatten(-1, (self.heads, -1)).split(self.q_dims, -1)
        k_nope, k_rope = self.kv_a_proj(hidden).split([latent_dim, rope_dim], -1)
        q = hidden.new_empty(len(hidden), self.heads, latent_dim + rope_dim)
        torch.bmm(q_nope.transpose(0, 1), self.k_weight, out=q[..., :latent_dim].transpose(0, 1))
        cache = step.latent_layers[self.layer]
        self.rotary.claim(step, self.layer)
        rope_store_mla_(
            q_rope,
            self.kv_a_norm(k_nope),
            k_rope,
            cache.rows,
            self.rotary.cos_sin_cache,
            step.positions,
            step.slots,
            scale=cache.scale,
            q_out=q[..., latent_dim:],
            window_slot_map=cache.window_slot_map,
            **self.rope_options,
        )
        out = latent_attention(q, step, self.layer, self.scale, latent_dim)
        values = torch.bmm(out.transpose(0, 1), self.v_weight.transpose(1, 2))
        return self.o_proj(values.transpose(0, 1).flatten(1))[None], None
