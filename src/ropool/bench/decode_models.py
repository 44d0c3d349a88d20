"""The shapes of the models whose decode step is measured, apart because reading this needs no
`transformers`."""

from __future__ import annotations

from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    # The shapes of DeepSeek-V3, with four layers instead of 61: three dense, one with experts.
    "deepseek-v3-4-layers": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 4,
        "max_position_embeddings": 8192,
    },
}
"""Settings of the `transformers` config that differ from its defaults."""
