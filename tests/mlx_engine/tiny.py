"""Tiny models of `mlx-lm`, one of each covered kind, and what `mlx-lm` itself makes of them."""

from __future__ import annotations

import copy
import importlib
import random
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.generate import batch_generate, generate_step

VOCAB = 199

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0],
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-9x3-tied": {
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama3-scaled": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama-yarn-traditional": {
        "model_type": "llama",
        "rope_scaling": YARN,
        "rope_traditional": True,
    },
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama-dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama-window": {
        "model_type": "llama",
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 21,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma3-text": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 18,
        "sliding_window_pattern": 3,
    },
    "phi3-longrope": {
        "model_type": "phi3",
        "rope_scaling": LONGROPE,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
    },
}


def build(name: str, **changes: Any) -> Any:
    """The model `name` of `MODELS` with random float32 weights, the same at each call."""
    settings = {**_COMMON, **MODELS[name], **changes}
    module = importlib.import_module(f"mlx_lm.models.{settings['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    mx.random.seed(7)

    def weight(path: str, value: mx.array) -> mx.array:
        if value.ndim == 1:
            # gemma's norms add 1 to what is stored.
            mean = 0.0 if settings["model_type"] == "gemma3_text" or "bias" in path else 1.0
            return mean + 0.2 * mx.random.normal(value.shape)
        # Wide logits and attention that really chooses, so that no two tokens are close.
        wide = any(part in path for part in ("embed", "lm_head", "q_proj", "qkv_proj"))
        return (4.0 if wide else 1.5) / value.shape[1] ** 0.5 * mx.random.normal(value.shape)

    model.update(tree_map_with_path(weight, model.parameters()))
    mx.eval(model.parameters())
    return model


def copy_of(model: Any) -> Any:
    """A copy whose attention may be replaced."""
    return copy.deepcopy(model)


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of ragged lengths, 1 to `longest` tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[mx.array]]:
    """What `mlx-lm` answers to one prompt: tokens, and the log-probabilities that each was chosen
    from."""
    steps = list(generate_step(mx.array(prompt), model, max_tokens=count))
    return [int(token) for token, _ in steps], [row for _, row in steps]


class _Endless:
    """As much of a tokenizer as `batch_generate` asks for."""

    eos_token_ids: tuple[int, ...] = ()

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def batched(model: Any, ragged: list[list[int]], count: int) -> list[list[int]]:
    """What `mlx-lm`'s own batched generation answers."""
    found = batch_generate(model, _Endless(), ragged, max_tokens=count, return_token_ids=True)
    return [list(tokens) for tokens in found.token_ids]
