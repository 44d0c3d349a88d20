"""GPT-NeoX: LayerNorms, biases, a parallel residual, and one projection in which each head has its
Q, K and V side by side."""

from __future__ import annotations

from typing import Any

from ropool.integrations.transformers.attention import AttentionParts, PooledAttention, pack
from ropool.integrations.transformers.families.family import Family
from ropool.rotary import StackedRotary


def _attention(original: Any, layer: int, rotary: StackedRotary) -> PooledAttention:
    heads = original.config.num_attention_heads
    parts = AttentionParts(
        qkv_proj=pack((original.query_key_value,)),
        qkv_by_head=True,
        o_proj=original.dense,
        heads_q=heads,
        heads_kv=heads,
        head_dim=original.head_size,
        scale=original.scaling,
        window=None,
    )
    return PooledAttention(parts, layer, rotary)


GPT_NEOX = Family(
    attention=_attention,
    decoder=lambda model: model.gpt_neox,
    attention_name="attention",
    norm_name="final_layer_norm",
)
