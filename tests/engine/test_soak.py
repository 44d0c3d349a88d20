"""Hundreds of requests of every family, at random times and with aborts, over a pool for a third of
them: nothing leaks, nobody waits longer than the requests before it take, and every text is the one
that the request has alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import tiny
from engine.bytes_tokenizer import END_ID, byte_tokenizer
from ropool.engine import Engine, FinishReason, Request, SamplingParams
from ropool.engine import engine as engine_module
from ropool.engine.cache import PAGE_SIZE
from ropool.engine.detokenizer import Detokenizer
from ropool.engine.sampling import sample
from ropool.integrations.transformers import FAMILIES, PooledModel

REQUESTS = 500
PROMPTS = 24
LONGEST_PROMPT, LONGEST_ANSWER = 60, 24
MAX_REQUESTS, MAX_BATCH_TOKENS = 24, 64
# A third of what so many requests of average length hold.
POOL_TOKENS = MAX_REQUESTS * (LONGEST_PROMPT + LONGEST_ANSWER) // 2 // 3
END_IDS = [3, 4, 5, END_ID]
NOISE = 1e-3
"""What rounding in another batch may do to a logit; up to 3e-4 was seen."""

# Where a family has no model of its own name in the table, or one that does more.
NAMES = {"mistral": "mistral-window", "qwen2": "qwen2-some-windows", "phi3": "phi3-longrope"}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
CHANGES = {"gemma3": _TWO_KINDS, "gemma3_text": _TWO_KINDS}


@dataclass(frozen=True)
class Alone:
    """A prompt with its longest answer. A shorter answer is the beginning of that."""

    prompt: list[int]
    params: SamplingParams
    output: list[int]
    text: str


@dataclass
class Arrival:
    """One request of the crowd."""

    request: Request
    alone: Alone
    last_step: int
    """By which it has ended, as the scheduler promises."""
    text: str = ""
    """As it was streamed."""


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_soak(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    tokenizer = byte_tokenizer()
    model = _model(family, len(tokenizer))
    known = _answers_alone(model, tokenizer, draw, monkeypatch)
    engine = Engine(
        model,
        tokenizer,
        pool_tokens=POOL_TOKENS,
        max_requests=MAX_REQUESTS,
        max_batch_tokens=MAX_BATCH_TOKENS,
    )
    arrivals = _run_crowd(engine, known, draw)
    assert engine.scheduler.preemptions > 20
    assert {arrival.request.finish_reason for arrival in arrivals} == set(FinishReason)
    for arrival in arrivals:
        _check_text(arrival, tokenizer)
    engine.cache.allocator.check_no_leak()
    window_map = engine.cache.window_map
    assert (window_map is not None) == any(window is not None for window in model.spec.windows)
    if window_map is not None:
        window_map.allocator.check_no_leak()
        assert torch.all(window_map.slot_map == -1)


def _model(family: str, vocabulary: int) -> PooledModel:
    names = (name for name in tiny.MODELS if tiny.MODELS[name]["model_type"] == family)
    return PooledModel(
        tiny.build(
            NAMES.get(family) or next(names),
            vocab_size=vocabulary,
            num_hidden_layers=2,
            max_position_embeddings=128,
            eos_token_id=END_IDS,
            **CHANGES.get(family, {}),
        )
    )


def _answers_alone(
    model: PooledModel, tokenizer: Any, draw: random.Random, monkeypatch: pytest.MonkeyPatch
) -> list[Alone]:
    """Random prompts and seeds, each answered in an engine of its own. Those for which rounding
    could choose another token are left out."""
    close = False

    def watch(logits: Tensor, requests: Sequence[Request]) -> list[int]:
        nonlocal close
        close |= _is_close_call(logits, requests[0])
        return sample(logits, requests)

    known: list[Alone] = []
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "sample", watch)
        for seed in range(2 * PROMPTS):
            prompt = [draw.randrange(END_ID) for _ in range(draw.randint(1, LONGEST_PROMPT))]
            temperature = draw.choice([0.0, 0.0, 0.7, 1.2])
            params = SamplingParams(LONGEST_ANSWER, temperature, draw.choice([1.0, 0.9]), seed)
            close = False
            request = Engine(model, tokenizer, pool_tokens=128).generate([prompt], params)[0]
            if not close:
                known.append(Alone(prompt, params, request.output, request.text))
            if len(known) == PROMPTS:
                return known
    raise AssertionError(f"only {len(known)} of {2 * PROMPTS} answers have no close call")


def _is_close_call(logits: Tensor, request: Request) -> bool:
    # The number that is drawn stays until a token is appended.
    twin: Any = SimpleNamespace(params=request.params, draw=request.draw)
    noise = torch.Generator().manual_seed(0)
    noisy = logits + NOISE * (2 * torch.rand(16, logits.shape[1], generator=noise) - 1)
    return len(set(sample(noisy, [twin] * len(noisy)))) > 1


def _run_crowd(engine: Engine, known: list[Alone], draw: random.Random) -> list[Arrival]:
    """Bursts of requests and single aborts, until all have ended."""
    arrivals: list[Arrival] = []
    streamed: dict[Request, Arrival] = {}
    step = 0
    while len(arrivals) < REQUESTS or engine.unfinished:
        if draw.random() < 0.1:
            for _ in range(min(draw.randint(1, 2 * MAX_REQUESTS), REQUESTS - len(arrivals))):
                alone = draw.choice(known)
                length = draw.randint(1, LONGEST_ANSWER)
                params = dataclasses.replace(alone.params, max_new_tokens=length)
                arrival = Arrival(engine.add(alone.prompt, params), alone, step)
                arrivals.append(arrival)
                streamed[arrival.request] = arrival
                arrival.last_step = step + sum(map(_steps, _unfinished(arrivals)))
        if draw.random() < 0.1 and arrivals:
            engine.abort(draw.choice(arrivals[-MAX_REQUESTS:]).request)

        oldest = next(_unfinished(arrivals), None)
        before = oldest and (len(oldest.request.tokens), oldest.request.computed)
        for event in engine.step():
            streamed[event.request].text += event.text
        step += 1
        if oldest is not None:
            assert before != (len(oldest.request.tokens), oldest.request.computed)
        for arrival in _unfinished(arrivals):
            assert step < arrival.last_step
        _check_pages(engine)
    return arrivals


def _unfinished(arrivals: list[Arrival]) -> Iterator[Arrival]:
    return (arrival for arrival in arrivals if arrival.request.finish_reason is None)


def _steps(arrival: Arrival) -> int:
    """The most steps that a request takes once it is the oldest: all its tokens may have to be
    computed anew, beside the decoding of all others, and once more where its rotation changes."""
    request = arrival.request
    tokens = request.prompt_tokens + request.params.max_new_tokens
    prefill = -(-tokens // (MAX_BATCH_TOKENS - MAX_REQUESTS + 1))
    return 2 * prefill + request.params.max_new_tokens


def _check_pages(engine: Engine) -> None:
    """Every page in use is a running request's, and of the window pool those inside its window."""
    tables = [request.table for request in engine.scheduler.running]
    cache = engine.cache
    assert cache.allocator.used_slots == PAGE_SIZE * sum(len(table.pages) for table in tables)
    if cache.window_map is not None:
        backed = sum(len(table.pages) - table.first_backed for table in tables)
        assert cache.window_map.allocator.used_slots == PAGE_SIZE * backed


def _check_text(arrival: Arrival, tokenizer: Any) -> None:
    request, alone = arrival.request, arrival.alone
    if request.finish_reason is FinishReason.ABORT:
        assert request.output == alone.output[: len(request.output)]
        assert alone.text.startswith(arrival.text)
        return
    output = alone.output[: request.params.max_new_tokens]
    detokenizer = Detokenizer(tokenizer)
    text = "".join([*map(detokenizer.push, output), detokenizer.flush()])
    assert request.output == output
    assert request.text == arrival.text == text
    assert (request.finish_reason is FinishReason.STOP) == (output[-1] in END_IDS)
