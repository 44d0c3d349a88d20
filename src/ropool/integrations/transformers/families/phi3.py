"""Phi-3: one projection for Q, K and V, and one window for all layers, which only the config
knows."""

from __future__ import annotations

from typing import Any

from ropool.integrations.transformers.attention import AttentionParts, PooledAttention, pack
from ropool.integrations.transformers.families.family import Family
from ropool.rotary import StackedRotary


def _attention(original: Any, layer: int, rotary: StackedRotary) -> PooledAttention:
    config = original.config
    parts = AttentionParts(
        qkv_proj=pack((original.qkv_proj,)),
        o_proj=original.o_proj,
        heads_q=config.num_attention_heads,
        heads_kv=config.num_key_value_heads,
        head_dim=original.head_dim,
        scale=original.scaling,
        window=config.sliding_window,
    )
    return PooledAttention(parts, layer, rotary)


PHI3 = Family(attention=_attention)
