"""Families with a decoder like Llama's: separate projections, one norm before each half of a layer.

Biases, QK-norms and attention sinks are taken where a module has them, and experts stand outside
attention, so Qwen2, Qwen3, Qwen3-MoE, GLM and gpt-oss need nothing of their own.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForImageTextToText

from ropool.integrations.transformers.attention import PooledAttention, separate_projections
from ropool.integrations.transformers.families.family import Family
from ropool.rotary import StackedRotary


def _attention(original: Any, layer: int, rotary: StackedRotary) -> PooledAttention:
    # The Qwen families and gpt-oss keep the window of a layer in the layer.
    window = getattr(original, "sliding_window", None)
    return PooledAttention(separate_projections(original, window), layer, rotary)


def _mistral_attention(original: Any, layer: int, rotary: StackedRotary) -> PooledAttention:
    parts = separate_projections(original, original.config.sliding_window)
    return PooledAttention(parts, layer, rotary)


LLAMA = Family(attention=_attention)
QWEN2_VL = Family(
    attention=_attention,
    decoder=lambda model: model.model.language_model,
    auto_class=AutoModelForImageTextToText,
)
"""The language model of Qwen2-VL."""
MISTRAL = Family(attention=_mistral_attention)
"""As Llama, with one window for all layers, which only the config knows."""
