"""transformers' own rotary code as the oracle: configs of every variant, their frequencies in
float32 and in float64, and their rotary modules."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SHORT = [1.0 + 0.02 * i for i in range(48)]
LONG = [1.0 + 1.3 * i for i in range(48)]
DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.6,
}


class Case(NamedTuple):
    """A config of transformers, the layers meant, and a sequence length for what depends on one."""

    name: str
    config: Any
    rotary: str
    """`family.class` of their rotary module."""
    layer_type: str | None = None
    seq_len: int | None = None

    def __str__(self) -> str:
        return self.name


def llama(**rope: Any) -> Any:
    """A Llama config with these rope parameters and 12 heads of 80 or, for LongRoPE, of 96."""
    rope.setdefault("rope_theta", 500000.0)
    head_dim = rope.pop("head_dim", 80)
    return transformers.LlamaConfig(
        hidden_size=12 * head_dim,
        num_attention_heads=12,
        max_position_embeddings=131072 if rope.get("rope_type") != "dynamic" else 4096,
        rope_parameters=rope,
    )


def cases() -> list[Case]:
    phi3 = transformers.Phi3Config(
        hidden_size=12 * 96,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        pad_token_id=0,
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    )
    gemma3 = transformers.Gemma3TextConfig(
        head_dim=64,
        max_position_embeddings=131072,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    gemma4 = transformers.Gemma4TextConfig(
        max_position_embeddings=131072, head_dim=64, global_head_dim=96
    )
    deepseek = transformers.DeepseekV3Config(
        max_position_embeddings=163840, rope_scaling=dict(DEEPSEEK_YARN)
    )
    gpt_oss = transformers.GptOssConfig()  # YaRN without truncation
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    llama3 |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain = "llama.LlamaRotaryEmbedding"
    return [
        Case("default", llama(rope_type="default"), plain),
        Case("linear", llama(rope_type="linear", factor=4.0), plain),
        Case("dynamic-short", llama(rope_type="dynamic", factor=2.0), plain, seq_len=4096),
        Case("dynamic-long", llama(rope_type="dynamic", factor=2.0), plain, seq_len=131072),
        Case("yarn", llama(**yarn), plain),
        Case("yarn-factor", llama(**yarn, attention_factor=0.7), plain),
        Case("yarn-real", llama(**yarn, truncate=False, beta_fast=20.0, beta_slow=2.0), plain),
        Case("yarn-deepseek", deepseek, "deepseek_v3.DeepseekV3RotaryEmbedding"),
        Case("yarn-gpt-oss", gpt_oss, "gpt_oss.GptOssRotaryEmbedding"),
        Case("llama3", llama(**llama3), plain),
        Case("longrope-short", phi3, "phi3.Phi3RotaryEmbedding", seq_len=4096),
        Case("longrope-long", phi3, "phi3.Phi3RotaryEmbedding", seq_len=131072),
        Case("proportional", llama(rope_type="proportional", partial_rotary_factor=0.3), plain),
        Case("gemma3-global", gemma3, "gemma3.Gemma3RotaryEmbedding", "full_attention"),
        Case("gemma3-local", gemma3, "gemma3.Gemma3RotaryEmbedding", "sliding_attention"),
        Case("gemma4-global", gemma4, "gemma4.Gemma4TextRotaryEmbedding", "full_attention"),
        Case("gemma4-local", gemma4, "gemma4.Gemma4TextRotaryEmbedding", "sliding_attention"),
        Case("partial-glm", transformers.GlmConfig(), "glm.GlmRotaryEmbedding"),
        Case("partial-gpt-neox", transformers.GPTNeoXConfig(), "gpt_neox.GPTNeoXRotaryEmbedding"),
    ]


def modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def rotary_class(case: Case) -> Any:
    family, name = case.rotary.split(".")
    return getattr(modeling(family), name)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Run transformers' code in float64: it names `torch.float` and `.float()` throughout."""
    with (
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def frequencies(case: Case) -> tuple[torch.Tensor, float]:
    """Their inverse frequencies and attention factor, in the dtype their code computes in."""
    config = case.config
    rope = config.rope_parameters
    rope = rope if case.layer_type is None else rope[case.layer_type]
    keywords: dict[str, Any] = {} if case.layer_type is None else {"layer_type": case.layer_type}
    if rope["rope_type"] != "default":
        compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        return compute(config, torch.device("cpu"), seq_len=case.seq_len, **keywords)
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[case.layer_type]
    return rotary_class(case).compute_default_rope_parameters(config, **keywords)
