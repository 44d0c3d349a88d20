"""Thousands of requests of random lengths, with aborts, over a pool that is always short: nothing
leaks, and every text is the one that the request has alone."""

from __future__ import annotations

import random

import torch

from engine import tiny
from engine.bytes_tokenizer import END_ID, byte_tokenizer
from ropool.engine import Engine, FinishReason, Request, SamplingParams
from ropool.integrations.transformers import PooledModel

REQUESTS = 3000
KINDS = 150


def test_soak() -> None:
    draw = random.Random(0)
    tokenizer = byte_tokenizer()
    hf_model = tiny.build(
        "qwen2-some-windows",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=128,
        eos_token_id=[3, 4, 5, END_ID],
    )
    model = PooledModel(hf_model)
    kinds = []
    for seed in range(KINDS):
        prompt = [draw.randrange(END_ID) for _ in range(draw.randint(1, 60))]
        temperature = draw.choice([0.0, 0.0, 0.7, 1.2])
        params = SamplingParams(draw.randint(1, 40), temperature, draw.choice([1.0, 0.9]), seed)
        engine = Engine(model, tokenizer, pool_tokens=128)
        kinds.append((prompt, params, engine.generate([prompt], params)[0]))

    engine = Engine(model, tokenizer, pool_tokens=480, max_requests=12, max_batch_tokens=40)
    added: list[tuple[Request, Request]] = []
    streamed: dict[Request, str] = {}
    while len(added) < REQUESTS or engine.unfinished:
        while len(added) < REQUESTS and len(engine.scheduler.waiting) < 4:
            prompt, params, alone = draw.choice(kinds)
            added.append((engine.add(prompt, params), alone))
        if draw.random() < 0.1:
            request = draw.choice(added[-16:])[0]
            engine.abort(request)
        for event in engine.step():
            streamed[event.request] = streamed.get(event.request, "") + event.text
        used = sum(len(request.table.pages) for request in engine.scheduler.running)
        assert engine.cache.allocator.used_slots == 16 * used

    assert engine.scheduler.preemptions > 50
    reasons = set()
    for request, alone in added:
        reasons.add(request.finish_reason)
        if request.finish_reason is FinishReason.ABORT:
            assert request.output == alone.output[: len(request.output)]
            assert alone.text.startswith(streamed.get(request, ""))
        else:
            assert request.output == alone.output
            assert request.text == streamed[request] == alone.text
            assert request.finish_reason == alone.finish_reason
    assert reasons == set(FinishReason)
    engine.cache.allocator.check_no_leak()
    assert engine.cache.window_map is not None
    engine.cache.window_map.allocator.check_no_leak()
    assert torch.all(engine.cache.window_map.slot_map == -1)
