"""The rotation is the one of the family's own code, whatever else the config says; and a model
whose own module rotates otherwise is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine import tiny
from ropool.engine import Engine, Request, SamplingParams
from ropool.errors import RopoolError
from ropool.integrations.transformers import FAMILIES, PooledModel

HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
MSCALES = {"short_mscale": 1.3, "long_mscale": 1.6}

UNREAD: list[tuple[str, dict[str, Any]]] = [
    *((name, {"rope_parameters": HALF}) for name in ("llama", "mistral-window", "qwen2", "qwen3")),
    *((name, {"rope_parameters": HALF}) for name in ("qwen3_moe", "gpt-oss")),
    ("qwen2_vl", {"rope_parameters": {**HALF, "mrope_section": [2, 3, 3]}}),
    ("gemma3", {"rope_parameters": {"sliding_attention": HALF, "full_attention": HALF}}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rotary_pct": 0.5}),
    ("llama", {"rotary_dim": 8}),
    ("llama", {"qk_rope_head_dim": 8}),
    ("deepseek_v2", {"rope_interleave": False}),
    ("glm", {"rope_interleave": False}),
    ("llama", {"rope_interleave": True}),
    ("qwen3", {"rope_interleave": True}),
    ("phi3-longrope", {"rope_parameters": {**tiny.LONGROPE["rope_parameters"], **MSCALES}}),
    (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": LOCAL,
                "full_attention": {**tiny.YARN, "truncate": False},
            }
        },
    ),
]


@pytest.mark.parametrize(
    ("name", "options"), UNREAD, ids=[f"{name}-{next(iter(options))}" for name, options in UNREAD]
)
def test_options_that_a_family_does_not_read(
    name: str, options: dict[str, Any], logits_of: dict[Request, list[Tensor]]
) -> None:
    model = tiny.build(name, **options)
    pooled = PooledModel(tiny.copy_of(model))
    prompts = [[n % tiny.VOCAB for n in range(7, 7 + length)] for length in (30, 60)]
    with torch.inference_mode():
        expected = [model(torch.tensor([p]), use_cache=False).logits[0, -1] for p in prompts]
    requests = Engine(pooled, pool_tokens=128).generate(prompts, SamplingParams(max_new_tokens=1))
    for request, logits in zip(requests, expected, strict=True):
        torch.testing.assert_close(logits_of[request][0], logits, rtol=1e-4, atol=1e-3)


def _rotary(model: Any) -> Any:
    return FAMILIES[model.config.model_type].decoder(model).rotary_emb


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("llama", ""), ("phi3-longrope", ""), ("deepseek_v3", ""), ("gemma3", "sliding_attention_")],
)
def test_another_rotation_in_the_model_itself_is_refused(name: str, prefix: str) -> None:
    message = "transformers rotates Q and K.* by other frequencies"
    model = tiny.build(name)
    getattr(_rotary(model), f"{prefix}original_inv_freq")[1] *= 1.001
    with pytest.raises(RopoolError, match=message) as caught:
        PooledModel(model)
    assert ("of its sliding_attention layers" in str(caught.value)) == (name == "gemma3")
    model = tiny.build(name)
    setattr(_rotary(model), f"{prefix}attention_scaling", 1.05)
    with pytest.raises(RopoolError, match=message):
        PooledModel(model)


def test_the_long_frequencies_are_compared_too() -> None:
    model = tiny.build("phi3-longrope")
    rotary = _rotary(model)
    rotary.config = tiny.copy_of(rotary.config)
    rotary.config.rope_parameters["long_factor"][2] = 2.1
    with pytest.raises(RopoolError, match="transformers rotates Q and K by other frequencies"):
        PooledModel(model)


def test_a_module_that_has_grown_or_was_rounded_is_the_same() -> None:
    model = tiny.build("phi3-longrope")
    with torch.inference_mode():
        model(torch.ones(1, 50, dtype=torch.long))
    PooledModel(model)
    PooledModel(tiny.build("llama-bias-llama3").bfloat16())


def test_a_width_that_its_code_trips_over_is_refused() -> None:
    rope = {**HALF, "rope_type": "linear", "factor": 4.0}
    with pytest.raises(RopoolError, match=r"partial_rotary_factor is 0.5, with rope_type 'linear'"):
        PooledModel(tiny.build("llama", rope_parameters=rope))
