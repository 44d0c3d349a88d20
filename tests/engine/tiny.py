"""Tiny models of each family, with weights that leave no close calls, and what `transformers`
itself makes of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

VOCAB = 199

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

# Of the families whose language model stands beside a vision model.
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "vision_config": {
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 1,
        },
        "image_token_id": VOCAB - 1,
        "video_token_id": VOCAB - 2,
        "vision_start_token_id": VOCAB - 3,
        "vision_end_token_id": VOCAB - 4,
    },
    "gemma3": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": VOCAB - 1,
        "boi_token_index": VOCAB - 2,
        "eoi_token_index": VOCAB - 3,
        "tie_word_embeddings": False,
    },
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LONGROPE = {
    "original_max_position_embeddings": 40,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
    },
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}

DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
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
    "llama-bias-llama3": {
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": LLAMA3_ROPE,
    },
    "llama-one-kv-head": {"model_type": "llama", "num_key_value_heads": 1},
    "mistral-wide-heads": {"model_type": "mistral", "head_dim": 24, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 21},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-some-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 18,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
    },
    "glm": {"model_type": "glm", "head_dim": 32},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gpt_neox-plain-residual": {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "phi3": {"model_type": "phi3"},
    "phi3-longrope": {"model_type": "phi3", **LONGROPE},
    "phi3-longrope-window": {"model_type": "phi3", "sliding_window": 19, **LONGROPE},
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        **DEEPSEEK,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.1},
    },
    "deepseek_v2-query-rank": {
        "model_type": "deepseek_v2",
        **DEEPSEEK,
        "q_lora_rank": 24,
        "attention_bias": True,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **DEEPSEEK,
        "q_lora_rank": 24,
        "n_group": 2,
        "topk_group": 1,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek_v3-neox": {
        "model_type": "deepseek_v3",
        **DEEPSEEK,
        "n_group": 3,
        "topk_group": 2,
        "rope_interleave": False,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 21,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,  # five with a window, one without
        "head_dim": 24,
        "query_pre_attn_scalar": 40,
        "sliding_window": 18,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
        },
    },
    "gemma3-beside-vision": {
        "model_type": "gemma3",
        "head_dim": 16,
        "sliding_window": 21,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3-capped": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 21,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 12.0,
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
    },
}

SEEDS = {"gpt-oss": 8, "phi3": 8, "phi3-longrope": 8, "phi3-longrope-window": 8}
"""Of the weights, where those of the common seed make a close call."""


def build(name: str, **changes: Any) -> Any:
    """The `transformers` model `name` of `MODELS` with random float32 weights, the same at each
    call."""
    settings = {**_COMMON, **MODELS[name], **changes}
    auto_class = AutoModelForCausalLM
    family = settings["model_type"]
    if family in _VISION:
        auto_class = AutoModelForImageTextToText
        text = {key: value for key, value in settings.items() if key != "model_type"}
        settings = {"model_type": family, "text_config": text, **_VISION[family]}
    config = AutoConfig.for_model(**settings)
    model = auto_class.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEEDS.get(name, 7))

    def normal(parameter: Tensor, std: float, mean: float = 0.0) -> None:
        parameter.normal_(mean, std, generator=generator)

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                normal(parameter, 0.3)
            elif parameter.dim() > 1:  # those of experts have three
                # Wide logits (their spread is about 4) and attention that really chooses.
                gain = 4.0 if "embed" in key or "lm_head" in key or "q_proj" in key else 1.5
                gain = 2.5 if "qkv_proj" in key or "query_key_value" in key else gain
                gain = 4.0 if "q_b_proj" in key else gain
                normal(parameter, gain / parameter.shape[-1] ** 0.5)
            elif key.endswith("sinks"):
                normal(parameter, 3.0)
            else:  # a norm; Gemma's multiply by 1 + weight
                normal(parameter, 0.3, 0.0 if config.model_type.startswith("gemma") else 1.0)
    return model


def copy_of(model: Any) -> Any:
    """A copy whose attention may be replaced."""
    return copy.deepcopy(model)


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of ragged lengths, 1 to `longest` tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], Tensor]:
    """What `transformers` answers to one prompt: its greedy tokens and their logits, `[count,
    vocab]`."""
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        # Some releases go on with keys that are rotated as those of a shorter text.
        return greedy_uncached(model, prompt, count)
    inputs = torch.tensor([prompt], device=model.device)
    result = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens: list[int] = result.sequences[0, len(prompt) :].tolist()
    return tokens, torch.cat(result.logits)


@torch.inference_mode()
def greedy_uncached(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], Tensor]:
    """As `greedy`, each token from a forward pass over all tokens before it."""
    tokens = list(prompt)
    logits = []
    for _ in range(count):
        inputs = torch.tensor([tokens], device=model.device)
        logits.append(model(inputs, use_cache=False).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(logits)
