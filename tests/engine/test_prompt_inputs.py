"""Prompts with images: their features stand in for tokens, and positions have three dimensions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import tiny
from ropool.engine import Engine, PromptInputs, Request, SamplingParams
from ropool.engine import engine as engine_module
from ropool.engine.sampling import sample
from ropool.errors import RopoolError
from ropool.integrations.transformers import PooledModel, image_inputs

NEW_TOKENS = 20
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS)
IMAGE = tiny.VOCAB - 1
# Patches: temporal, height and width of each image; four make a token.
GRIDS = [[(1, 4, 6)], [(1, 10, 4), (1, 2, 2)], [], [(2, 6, 12)], [(1, 12, 12)]]


def prompt_with(grids: Sequence[tuple[int, int, int]], seed: int) -> list[int]:
    """Texts before, between and after the images."""
    texts = tiny.prompts(len(grids) + 1, longest=12, seed=seed)
    prompt = [token % IMAGE for token in texts[0]]
    for (t, h, w), text in zip(grids, texts[1:], strict=True):
        prompt += [IMAGE] * (t * h * w // 4) + [token % IMAGE for token in text]
    return prompt


@torch.inference_mode()
def alone(model: Any, prompt: list[int], grids: Any, pixels: Tensor) -> tuple[list[int], Tensor]:
    """Greedy tokens and logits of `transformers`, from the pixels on."""
    ids = torch.tensor([prompt], device=model.device)
    vision = {
        "pixel_values": pixels.to(model.device),
        "image_grid_thw": torch.tensor(grids, device=model.device),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **(vision if grids else {}),
    )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits)


def test_images_and_texts_in_one_batch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Request, list[Tensor]] = defaultdict(list)

    def spy(logits: Tensor, requests: Sequence[Request]) -> list[int]:
        for row, request in zip(logits, requests, strict=True):
            seen[request].append(row.clone())
        return sample(logits, requests)

    monkeypatch.setattr(engine_module, "sample", spy)
    model = tiny.build("qwen2_vl").to(device)
    generator = torch.Generator().manual_seed(3)
    prompts = [prompt_with(grids, seed) for seed, grids in enumerate(GRIDS)]
    pixels = [
        torch.randn(sum(t * h * w for t, h, w in grids), 3 * 16, generator=generator)
        for grids in GRIDS
    ]
    # Chunks that cut images, and a pool that is too small for all.
    pooled = PooledModel(tiny.copy_of(model))
    engine = Engine(pooled, pool_tokens=160, max_requests=4, max_batch_tokens=11)
    requests = []
    for prompt, grids, pixel in zip(prompts, GRIDS, pixels, strict=True):
        images = image_inputs(pooled, prompt, pixel, torch.tensor(grids)) if grids else None
        requests.append(engine.add(prompt, PARAMS, images))
    for _ in engine.stream():
        pass
    assert engine.scheduler.preemptions > 0
    for prompt, grids, pixel, request in zip(prompts, GRIDS, pixels, requests, strict=True):
        tokens, logits = alone(model, prompt, grids, pixel)
        top = logits.topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 2e-3
        assert request.output == tokens
        torch.testing.assert_close(torch.stack(seen[request]), logits, rtol=1e-4, atol=1e-3)
    engine.cache.allocator.check_no_leak()


def test_images_that_do_not_fit_their_prompt_are_refused() -> None:
    pixels, grid = torch.zeros(16, 48), torch.tensor([[1, 4, 4]])
    with pytest.raises(RopoolError, match="has 3 image tokens; the images have 4 features"):
        image_inputs(PooledModel(tiny.build("qwen2_vl")), [1, *[IMAGE] * 3, 2], pixels, grid)
    model = PooledModel(tiny.build("qwen2_vl"))
    twice = torch.zeros(32, 48), torch.tensor([[1, 4, 4]] * 2)
    with pytest.raises(RopoolError, match=r"in runs of \[8\]; allowed: .* of \[4, 4\]"):
        image_inputs(model, [1, *[IMAGE] * 8, 2], *twice)
    with pytest.raises(RopoolError, match=r"in runs of \[2, 2\]; allowed: .* of \[4\]"):
        image_inputs(model, [1, IMAGE, IMAGE, 5, IMAGE, IMAGE, 2], pixels, grid)
    for wrong in (pixels[:8], grid), (pixels, grid[0]), (pixels, grid[:, :2]):
        with pytest.raises(RopoolError, match=r"image_grid_thw is .*; allowed: \[images, 3\]"):
            image_inputs(model, [1, *[IMAGE] * 4, 2], *wrong)
    with pytest.raises(RopoolError, match="family 'llama'; allowed: qwen2_vl"):
        image_inputs(PooledModel(tiny.build("llama")), [1, 2], pixels, grid)


def test_embeddings_stand_for_tokens_in_any_family() -> None:
    model = PooledModel(tiny.build("llama"))
    embedding = tiny.build("llama").get_input_embeddings()
    prompt, params = [5, 6, 7, 8, 9], SamplingParams(max_new_tokens=8)
    expected = Engine(model, pool_tokens=64).generate([prompt], params)[0].output
    rows = embedding(torch.tensor(prompt)).detach()
    engine = Engine(model, pool_tokens=64)
    request = engine.add([5, 0, 0, 8, 0], params, PromptInputs(None, {1: rows[1:3], 4: rows[4:]}))
    for _ in engine.stream():
        pass
    assert request.output == expected


def test_positions_end_with_the_context() -> None:
    model = PooledModel(tiny.build("qwen2_vl"))
    limit = model.spec.max_position
    positions = torch.zeros(3, 4, dtype=torch.int32)
    positions[1, 2] = limit - 4
    engine = Engine(model, pool_tokens=64)
    request = engine.add([1, 2, 3, 4], PARAMS, PromptInputs(positions))
    for _ in engine.stream():
        pass
    # The answer stands at limit - 3, limit - 2 and limit - 1; the last is never computed.
    assert len(request.output) == 3
    positions[1, 2] = limit - 1
    with pytest.raises(RopoolError, match=f"{limit} tokens; the model's context holds {limit}"):
        engine.add([1, 2, 3, 4], PARAMS, PromptInputs(positions))


@pytest.mark.parametrize(
    "name, inputs, message",
    [
        ("llama", PromptInputs(torch.zeros(3, 4).int()), "for models with M-RoPE only"),
        ("qwen2_vl", PromptInputs(torch.zeros(3, 5).int()), r"int32 \[3, 5\]; .* int64 \[3, 4\]"),
        ("qwen2_vl", PromptInputs(torch.zeros(3, 4)), r"float32 \[3, 4\]; allowed: int32 or int64"),
        ("qwen2_vl", PromptInputs(torch.zeros(4).long()), r"int64 \[4\]; allowed"),
        ("qwen2_vl", PromptInputs(torch.full((3, 4), -1)), "a position is -1; allowed: at least 0"),
        ("qwen2_vl", PromptInputs([[0] * 4] * 3), "positions are list; allowed: a tensor"),
        ("llama", PromptInputs(None, {1: [[0.0] * 64]}), "1 -> list; allowed: an integer -> a ten"),
        ("llama", PromptInputs(None, {0.5: torch.zeros(1, 64)}), "0.5 -> Tensor; allowed: an int"),
        ("llama", PromptInputs(None, {1: torch.zeros(2, 63)}), r"token 1 on are \[2, 63\]; .*64\]"),
        ("llama", PromptInputs(None, {3: torch.zeros(2, 64)}), "3 on; free are tokens 0 to 3"),
        (
            "llama",
            PromptInputs(None, {0: torch.zeros(3, 64), 2: torch.zeros(1, 64)}),
            "2 on; free are tokens 3 to 3",
        ),
        ("llama", PromptInputs(None, {-1: torch.zeros(1, 64)}), "-1 on; free are tokens 0 to 3"),
        ("gemma3-beside-vision", PromptInputs(None, {1: torch.zeros(2, 64)}), "without them only"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name: str, inputs: PromptInputs, message: str) -> None:
    engine = Engine(PooledModel(tiny.build(name)), pool_tokens=64)
    with pytest.raises(RopoolError, match=message):
        engine.add([1, 2, 3, 4], PARAMS, inputs)
    assert engine.unfinished == 0
