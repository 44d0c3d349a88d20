"""Requests: limits, ends, aborts, seeds and streaming."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from engine import tiny
from ropool.engine import Engine, FinishReason, SamplingParams
from ropool.errors import RopoolError
from ropool.integrations.transformers import PooledModel


@pytest.fixture(scope="module")
def model() -> PooledModel:
    return PooledModel(tiny.build("llama", num_hidden_layers=2))


def test_a_prompt_longer_than_the_context_is_refused(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=512)
    with pytest.raises(RopoolError, match=r"256 tokens; the model's context holds 256"):
        engine.add([1] * 256)
    request = engine.generate([[1] * 255])[0]
    assert len(request.output) == 1 and request.finish_reason is FinishReason.LENGTH


def test_the_context_ends_an_answer(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=256)
    request = engine.generate([[1] * 250], SamplingParams(max_new_tokens=100))[0]
    assert len(request.tokens) == 256 and request.finish_reason is FinishReason.LENGTH


def test_a_pool_too_small_for_one_request_is_refused(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=32)
    with pytest.raises(RopoolError, match=r"pool has 32 slots; .* 20 tokens .* needs 33"):
        engine.add([1] * 20, SamplingParams(max_new_tokens=14))
    assert len(engine.generate([[1] * 20], SamplingParams(max_new_tokens=13))[0].output) == 13
    assert engine.cache.allocator.peak_used_slots == 32
    for tokens in (0, 64.5):
        with pytest.raises(RopoolError, match=f"pool of {tokens} tokens; allowed: an integer"):
            Engine(model, pool_tokens=tokens)  # type: ignore[arg-type]


def test_more_requests_than_tokens_of_a_step_are_refused(model: PooledModel) -> None:
    with pytest.raises(RopoolError, match="max_requests=9, max_batch_tokens=8; allowed: 1 <="):
        Engine(model, pool_tokens=64, max_requests=9, max_batch_tokens=8)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.bfloat16, torch.int8], ids=str
)
def test_a_pool_that_the_op_cannot_write_is_refused(model: PooledModel, dtype: torch.dtype) -> None:
    allowed = "torch.float32, torch.float8_e4m3fn, torch.float8_e5m2$"
    with pytest.raises(RopoolError, match=f"cache_dtype is {dtype}; allowed: {allowed}"):
        Engine(model, pool_tokens=64, cache_dtype=dtype)


def test_an_empty_prompt_is_refused(model: PooledModel) -> None:
    with pytest.raises(RopoolError, match="the prompt is empty"):
        Engine(model, pool_tokens=32).add([])


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, set], ids=["torch", "numpy", "set"])
def test_a_prompt_that_is_no_list_is_refused(model: PooledModel, kind: Any) -> None:
    engine = Engine(model, pool_tokens=32, cache_dtype=torch.float8_e4m3fn)
    with pytest.raises(RopoolError, match=r"the prompt is \w+; allowed: a list of integers"):
        engine.add(kind([1, 2, 3]))
    with pytest.raises(RopoolError, match=r"the prompt is \w+; allowed: a list of integers"):
        engine.calibrate([kind([1, 2, 3])])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, must be an integer"),
        ({"seed": 1.5}, "seed is 1.5, must be an integer"),
        ({"temperature": None}, "temperature is None, must be a number"),
    ],
)
def test_sampling_params_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(RopoolError, match=message):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_an_end_of_text_token_ends_an_answer() -> None:
    hf_model = tiny.build("llama")
    tokens, _ = tiny.greedy(hf_model, [1, 2, 3], 20)
    end = tokens[7]
    hf_model.generation_config.eos_token_id = [end, 198]
    model = PooledModel(hf_model)
    assert model.spec.eos_ids == {end, 198}
    request = Engine(model, pool_tokens=256).generate([[1, 2, 3]])[0]
    assert request.finish_reason is FinishReason.STOP
    assert request.output == tokens[: tokens.index(end) + 1]


def test_abort_gives_the_slots_back(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=256, max_requests=2)
    running, other, waiting = (engine.add([n] * 20) for n in (1, 2, 3))
    engine.step()
    assert engine.cache.allocator.used_slots == 64
    for request in (running, waiting, running):
        engine.abort(request)
    assert engine.cache.allocator.used_slots == 32
    assert running.finish_reason is waiting.finish_reason is FinishReason.ABORT
    assert [event.request for event in engine.step()] == [other]
    engine.abort(other)
    assert engine.unfinished == 0 and engine.step() == []
    engine.cache.allocator.check_no_leak()


def test_an_aborted_request_has_no_more_events_and_a_left_stream_goes_on(
    model: PooledModel,
) -> None:
    engine = Engine(model, pool_tokens=256)
    params = SamplingParams(max_new_tokens=4)
    first, second, third = (engine.add([n] * 5, params) for n in (1, 2, 3))
    for event in engine.stream():
        assert event.request is first
        engine.abort(second)
        break
    rest = [event.request for event in engine.stream()]
    assert rest.count(first) == 3 and rest.count(third) == 4 and second not in rest


@pytest.mark.parametrize("token", [-1, 10**9, "a", 1.0])
def test_a_token_outside_the_vocabulary_is_refused(model: PooledModel, token: object) -> None:
    engine = Engine(model, pool_tokens=256)
    with pytest.raises(RopoolError, match=r"the prompt has token .*; allowed: 0 to \d+"):
        engine.add([1, token])  # type: ignore[list-item]
    assert engine.unfinished == 0


def test_a_seed_decides_a_text_whatever_the_batch(model: PooledModel) -> None:
    prompts = tiny.prompts(6, longest=30, seed=5)
    params = [
        SamplingParams(20, temperature=1.3, top_p=p, seed=seed)
        for seed, p in enumerate([1, 0.9, 0.5, 1, 0.9, 0.8])
    ]
    alone = []
    for prompt, param in zip(prompts, params, strict=True):
        alone.append(Engine(model, pool_tokens=256).generate([prompt], param)[0].output)
    # Preempted and resumed in between.
    engine = Engine(model, pool_tokens=112, max_batch_tokens=11, max_requests=6)
    requests = [engine.add(*pair) for pair in zip(prompts, params, strict=True)]
    for _ in engine.stream():
        pass
    assert engine.scheduler.preemptions > 0
    assert [request.output for request in requests] == alone
    assert (
        Engine(model, pool_tokens=256)
        .generate([prompts[0]], SamplingParams(20, 1.3, 1, seed=99))[0]
        .output
        != alone[0]
    )


def test_events_come_as_tokens_are_made(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=256)
    request = engine.add([1, 2, 3], SamplingParams(max_new_tokens=5))
    seen = []
    for event in engine.stream():
        assert event.request is request and event.token == request.output[-1]
        seen.append(event.token)
        if len(seen) == 2:  # joins while the other runs
            late = engine.add([9], SamplingParams(max_new_tokens=1))
            for _ in engine.step():
                pass
            assert late.finish_reason is FinishReason.LENGTH
            seen.append(request.output[-1])
    assert seen == request.output


def test_first_come_first_served(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=64, max_requests=8)
    requests = [engine.add([n] * 30, SamplingParams(max_new_tokens=6)) for n in range(1, 7)]
    order = [e.request for e in engine.stream() if e.request.finish_reason is not None]
    assert order == requests


def test_a_long_prompt_is_not_passed_by_short_ones(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=256, max_requests=8, max_batch_tokens=32)
    engine.add([1] * 100, SamplingParams(max_new_tokens=20))
    for _ in range(5):
        engine.step()
    long = engine.add([2] * 200, SamplingParams(max_new_tokens=4))
    short = []
    # Short ones arrive for ever; each would fit beside the first request, the long one does not.
    while long.finish_reason is None:
        short.append(engine.add([3] * 4, SamplingParams(max_new_tokens=1)))
        engine.step()
        assert long.computed or not any(request.output for request in short)
        # 20 tokens of the first request, 200 by 25 or more, and 4.
        assert len(short) <= 20 + 8 + 4


def test_a_long_prompt_does_not_hold_up_those_that_decode(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=512, max_requests=4, max_batch_tokens=16)
    decoding = [engine.add([n] * 5, SamplingParams(max_new_tokens=40)) for n in (1, 2)]
    engine.step()
    long = engine.add([3] * 200, SamplingParams(max_new_tokens=1))
    steps = 0
    while long.finish_reason is None:
        assert [event.request for event in engine.step()][:2] == decoding
        steps += 1
    assert steps == -(-200 // (16 - 2))


def test_throughput_counts_prompts_and_answers(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=256, max_batch_tokens=16, max_requests=4)
    engine.generate([[1] * 40], SamplingParams(max_new_tokens=10))
    speed = engine.throughput
    assert (speed.prefill_tokens, speed.decode_tokens) == (40, 9)
    assert speed.prefill_tokens_per_s > 0 and speed.decode_tokens_per_s > 0
