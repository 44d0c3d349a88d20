"""The models that `decode.py` compares: SmolLM2 with its weights, and of every other covered family
one of some ten million random weights, whose time is spent as in a real one: most of it in layers,
not in calls."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ropool.integrations.transformers import PooledModel
from ropool.integrations.transformers.load import find

REAL = ("smollm2",)
"""Names that `ropool.integrations.transformers.load` knows."""

_COMMON = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 384}
_MLA = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    **_MOE,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, "q_lora_rank": 256},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 48},
    "glm": {"head_dim": 64},
    "gpt_neox": {},
    "gpt_oss": {
        "head_dim": 64,
        "intermediate_size": 384,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 48,
    },
    "llama": {},
    "mistral": {"sliding_window": 48},
    "phi3": {},
    "qwen2": {},
    "qwen2_vl": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 12, 12],
        },
    },
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "num_experts": 8, **_MOE},
}
"""`model_type` -> what its config has beside, or instead of, the common settings."""

ALIKE = {"gemma3": "gemma3_text"}
"""Families whose language model is that of another in the table."""

_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 512, "num_heads": 2},
        "image_token_id": 8191,
        "video_token_id": 8190,
        "vision_start_token_id": 8189,
        "vision_end_token_id": 8188,
    },
}


def random_model(family: str) -> Any:
    """The `transformers` model of a family, float32, the same weights at each call."""
    settings = {**_COMMON, **FAMILIES[family]}
    auto_class = AutoModelForCausalLM
    if family in _VISION:
        auto_class = AutoModelForImageTextToText
        settings = {"text_config": settings, **_VISION[family]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = auto_class.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # wide logits, so that the likeliest token is no near tie
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
    return model


def pair(name: str) -> tuple[Any, PooledModel]:
    """A model as `transformers` runs it, and the same over ropool's pool."""
    if name in REAL:
        source = find(name, print)
        theirs, ours = (
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval() for _ in "ab"
        )
    else:
        theirs = random_model(name)
        ours = copy.deepcopy(theirs)
    return theirs, PooledModel(ours)
