"""What only an NVIDIA GPU shows of the engine: no layer waits for the device, decode steps can be
replayed as CUDA graphs, and a model may be on another device than the current one. The tokens and
logits of every family on the GPU are compared in `test_families` and its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import tiny
from ropool.dispatch import chosen
from ropool.engine import Engine, SamplingParams
from ropool.engine.step import AttentionGroup, Step
from ropool.integrations.transformers.model import PooledModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PARAMS = SamplingParams(max_new_tokens=24)


class Unsynchronised(PooledModel):
    """A model whose forward pass fails where the host would wait for the device, except in the
    library's own feed-forward layers: some of those choose experts on the host."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for layer in self._layers:
            layer.mlp.register_forward_pre_hook(lambda *_: _waiting_is("default"))
            layer.mlp.register_forward_hook(lambda *_: _waiting_is("error"))

    def forward(self, step: Step) -> Tensor:
        _waiting_is("error")
        try:
            return super().forward(step)
        finally:
            _waiting_is("default")


def _waiting_is(mode: str) -> None:
    torch.cuda.set_sync_debug_mode(mode)


class Replayed(PooledModel):
    """A model that decodes in CUDA graphs: one for each shape of step, replayed with the numbers of
    every step of that shape."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if hasattr(model.config.get_text_config(), "num_experts_per_tok"):
            model.set_experts_implementation("batched_mm")  # the others choose on the host
        self.graphs: dict[Any, tuple[Step, torch.cuda.CUDAGraph, Tensor]] = {}
        self.replays = 0

    def forward(self, step: Step) -> Tensor:
        if len(step.tokens) != len(step.sample_rows):
            return super().forward(step)
        shape = tuple(tensor.shape for tensor in numbers_of(step))
        if shape not in self.graphs:
            self.graphs[shape] = self.captured(step)
        captured, graph, logits = self.graphs[shape]
        for kept, new in zip(numbers_of(captured), numbers_of(step), strict=True):
            kept.copy_(new)
        graph.replay()
        self.replays += 1
        return logits.clone()

    def captured(self, step: Step) -> tuple[Step, torch.cuda.CUDAGraph, Tensor]:
        """The step, whose tensors the graph reads, and the logits, which it writes."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # loads what no capture may load
            super().forward(step)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            logits = super().forward(step)
        return step, graph, logits


def numbers_of(step: Step) -> Iterator[Tensor]:
    """What differs between steps of one shape."""
    yield from (step.tokens, step.positions, step.slots, step.sample_rows)
    for groups in step.groups.values():
        for group in groups:
            yield from masked(group)


def masked(group: AttentionGroup) -> tuple[Tensor, Tensor]:
    """The tensors of a group; one that decodes has a mask."""
    assert group.mask is not None
    return group.pages, group.mask


@pytest.mark.parametrize("name", tiny.MODELS)
def test_no_layer_waits_for_the_device(name: str) -> None:
    engine = Engine(
        Unsynchronised(tiny.build(name).cuda()),
        pool_tokens=192,
        max_requests=5,
        max_batch_tokens=23,
    )
    engine.generate(tiny.prompts(8, longest=70), SamplingParams(max_new_tokens=8))
    op = "rope_store_mla_" if engine.cache.latent_layers else "rope_store_kv_"
    assert chosen[op].startswith("cuda/")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_decode_steps_replay_in_graphs(name: str) -> None:
    """With the tokens, positions, slots, pages and masks of each step."""
    original = tiny.build(name).cuda()
    prompts = tiny.prompts(5, longest=30, seed=5)
    model = Replayed(tiny.copy_of(original))
    requests = Engine(model, pool_tokens=512).generate(prompts, PARAMS)
    assert model.replays > len(model.graphs) + 8
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output == tiny.greedy(original, prompt, 24)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_16_bit_models_and_fp8_pools_run(name: str, dtype: torch.dtype) -> None:
    original = tiny.build(name).cuda()
    for parameter in original.parameters():  # and no buffer: rotations stay in float32
        parameter.data = parameter.data.to(dtype)
    model = Unsynchronised(original)
    for cache_dtype in (None, torch.float8_e4m3fn, torch.float8_e5m2):
        engine = Engine(model, pool_tokens=256, cache_dtype=cache_dtype)
        params = SamplingParams(max_new_tokens=8, temperature=0.8, top_p=0.9)
        for request in engine.generate(tiny.prompts(3, longest=40), params):
            assert len(request.output) == 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@pytest.mark.parametrize("name", ["llama", "gpt-oss", "deepseek_v3"])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
def test_a_model_on_another_device(name: str, cache_dtype: torch.dtype | None) -> None:
    """The answers are those of the first device, which is the current one all the time."""
    prompts = tiny.prompts(6, longest=50, seed=7)
    answers = []
    for device in ("cuda:0", "cuda:1"):
        model = PooledModel(tiny.build(name).to(device))
        engine = Engine(model, pool_tokens=192, max_requests=4, cache_dtype=cache_dtype)
        requests = engine.generate(prompts, PARAMS)
        assert engine.scheduler.preemptions > 0
        answers.append([request.output for request in requests])
        assert torch.cuda.current_device() == 0
    assert answers[0] == answers[1]
