"""Rotary position embeddings: configs, frequencies, and the tables the rotating ops read."""

from ropool.rotary.config import RotaryConfig, RotaryOptions
from ropool.rotary.embedding import RotaryEmbedding
from ropool.rotary.frequencies import attention_factor, inv_freq, length_range
from ropool.rotary.scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Scaling,
    YarnScaling,
)
from ropool.rotary.stacked import StackedRotary
from ropool.rotary.table import cos_sin_cache, pack_cos_sin

__all__ = [
    "DynamicNTKScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "ProportionalScaling",
    "RotaryConfig",
    "RotaryEmbedding",
    "RotaryOptions",
    "Scaling",
    "StackedRotary",
    "YarnScaling",
    "attention_factor",
    "cos_sin_cache",
    "inv_freq",
    "length_range",
    "pack_cos_sin",
]
