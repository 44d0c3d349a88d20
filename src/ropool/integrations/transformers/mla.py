"""The module that stands in the attention places of models with multi-head latent attention (MLA,
DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ropool.engine.latent import LatentHeads, latent_attention
from ropool.engine.spec import LatentRow
from ropool.engine.step import Step
from ropool.ops import rope_store_mla_
from ropool.rotary import StackedRotary


class LatentAttention(nn.Module):
    """Attention that keeps one latent row a token in the pool, whatever the number of heads.

    Takes over the weights of `original`, an attention module of DeepSeek-V2 or V3. Between
    projections and attention stands one `rope_store_mla_` call, which rotates the rope part of Q
    and K and writes the row.
    """

    window: int | None = None

    def __init__(self, original: Any, layer: int, rotary: StackedRotary) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary
        self.rope_options: dict[str, Any] = dict(rotary.options)
        self.row = LatentRow(original.kv_lora_rank, original.qk_rope_head_dim)
        kv_weight = original.kv_b_proj.weight.detach().unflatten(0, (original.num_heads, -1))
        self.heads = LatentHeads(self.row, original.qk_nope_head_dim, kv_weight, original.scaling)
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
        q = self.q_proj(hidden).unflatten(-1, (-1, self.heads.key_dim))
        k_nope, k_rope = self.kv_a_proj(hidden).split(list(self.row), -1)
        cache = step.latent_layers[self.layer]
        self.rotary.claim(step, self.layer, "rope_store_mla_")
        rope_store_mla_(
            q[..., -self.row.rope_dim :],
            self.kv_a_norm(k_nope),
            k_rope,
            cache.rows,
            self.rotary.cos_sin_cache,
            step.positions,
            step.slots,
            scale=cache.scale,
            window_slot_map=cache.window_slot_map,
            **self.rope_options,
        )
        out = latent_attention(q, step, self.layer, self.heads)
        return self.o_proj(out.flatten(1))[None], None
