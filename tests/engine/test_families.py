"""Each family gives the tokens and logits of `transformers`, whatever shares its batch and its
pool."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import tiny
from ropool.engine import Engine, FinishReason, Request, SamplingParams
from ropool.errors import RopoolError
from ropool.integrations.transformers import FAMILIES, PooledModel
from ropool.integrations.transformers import attention as attention_module

NEW_TOKENS = 24
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS)

TOLERANCE = {
    # Logits are near 10 in these models: sums in another order. Up to 3e-4 was seen.
    torch.float32: {"rtol": 1e-4, "atol": 1e-3},
}


def run_with_joins(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Request]:
    """Requests join in pairs, a few steps apart."""
    requests: list[Request] = []
    for first in range(0, len(prompts), 2):
        requests += [engine.add(prompt, PARAMS) for prompt in prompts[first : first + 2]]
        for _ in range(5):
            engine.step()
    for _ in engine.stream():
        pass
    return requests


@pytest.mark.parametrize("name", tiny.MODELS)
def test_ragged_batches_agree_with_transformers(
    name: str, device: str, logits_of: dict[Request, list[Tensor]]
) -> None:
    model = tiny.build(name).to(device)
    prompts = tiny.prompts(8, longest=70)
    # So small that requests are preempted, with chunks shorter than most prompts.
    engine = Engine(
        PooledModel(tiny.copy_of(model)), pool_tokens=192, max_requests=5, max_batch_tokens=23
    )
    requests = run_with_joins(engine, prompts)
    assert engine.scheduler.preemptions > 0
    for prompt, request in zip(prompts, requests, strict=True):
        tokens, logits = tiny.greedy(model, prompt, NEW_TOKENS)
        top = logits.topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 2e-3, "a tie would make this test a coin toss"
        assert request.output == tokens
        assert request.finish_reason is FinishReason.LENGTH
        got = torch.stack(logits_of[request])
        torch.testing.assert_close(got, logits, **TOLERANCE[torch.float32])
    engine.cache.allocator.check_no_leak()
    if engine.cache.window_map is not None:
        engine.cache.window_map.allocator.check_no_leak()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt-oss", "gemma3"])
def test_bfloat16_agrees_with_transformers(
    name: str, device: str, logits_of: dict[Request, list[Tensor]]
) -> None:
    model = tiny.build(name).to(device, torch.bfloat16)
    exact = tiny.build(name).to(device)
    prompt = tiny.prompts(1, longest=70, seed=1)[0]
    engine = Engine(PooledModel(tiny.copy_of(model)), pool_tokens=256)
    request = engine.generate([prompt], SamplingParams(max_new_tokens=1))[0]
    with torch.inference_mode():
        inputs = torch.tensor([prompt], device=device)
        reference = exact(inputs).logits[0, -1]
        theirs = model(inputs).logits[0, -1].float()
    ours = logits_of[request][0]
    # Both round to bfloat16 in other places; ours must not be further from float32 than theirs.
    error, allowed = (ours - reference).norm(), (theirs - reference).norm()
    assert error < 1.5 * allowed


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3_moe",
        "mistral-window",
        "glm",
        "gpt_neox",
        "phi3-longrope",
        "gpt-oss",
        "gemma3",
        "qwen2_vl",
    ],
)
def test_one_op_call_a_layer_and_no_other_rotation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(name)
    module = __import__(type(model).__module__, fromlist=["_"])
    calls = 0
    op = attention_module.rope_store_kv_

    def count(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        packed = {tensor.untyped_storage().data_ptr() for tensor in args[:3]}
        assert len(packed) == 1, "Q, K and V are views of what the projection wrote"
        op(*args, **kwargs)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rotated a second time")

    pooled = PooledModel(model)
    monkeypatch.setattr(attention_module, "rope_store_kv_", count)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", refuse)
    decoder = FAMILIES[model.config.model_type].decoder(model)
    monkeypatch.setattr(decoder.rotary_emb, "forward", refuse)
    engine = Engine(pooled, pool_tokens=64)
    engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
    assert calls == 4 * len(decoder.layers)


def test_a_window_pool_holds_windows_only() -> None:
    engine = Engine(
        PooledModel(tiny.build("mistral-window")),
        pool_tokens=1024,
        max_requests=2,
        max_batch_tokens=32,
    )
    window_map = engine.cache.window_map
    assert window_map is not None and False not in engine.cache.pools
    # Per request: 21 tokens touch 3 pages of 16 at most, and a new one may join; a chunk adds 2.
    assert window_map.allocator.slots == (2 * 4 + 2) * 16
    engine.generate([[5] * 100, [6] * 130], SamplingParams(max_new_tokens=100))
    assert engine.cache.allocator.peak_used_slots > 400
    assert window_map.allocator.peak_used_slots <= 2 * 5 * 16
    window_map.allocator.check_no_leak()


def test_full_layers_keep_what_window_layers_free() -> None:
    engine = Engine(
        PooledModel(tiny.build("gpt-oss")), pool_tokens=1024, max_requests=2, max_batch_tokens=32
    )
    window_map, full = engine.cache.window_map, engine.cache.allocator
    assert window_map is not None and set(engine.cache.pools) == {False, True}
    requests = [engine.add([token] * 100, SamplingParams(max_new_tokens=100)) for token in (5, 6)]
    while engine.unfinished:
        engine.step()
        running = engine.scheduler.running
        assert full.used_slots >= sum(request.computed for request in running)
        # 21 tokens touch 3 pages of 16 at most; a chunk of 32 starts inside a page.
        decoding = all(request.remaining == 1 for request in requests)
        assert window_map.allocator.used_slots <= (3 * len(running) + 3 * (not decoding)) * 16
    assert full.peak_used_slots == 2 * 13 * 16
    full.check_no_leak()
    window_map.allocator.check_no_leak()


def test_nan_in_a_free_page_reaches_nobody(device: str) -> None:
    model = tiny.build("qwen2-some-windows").to(device)
    engine = Engine(PooledModel(tiny.copy_of(model)), pool_tokens=256)
    for pool in engine.cache.pools.values():
        for layer in range(pool.layers):
            pool.k(layer).fill_(torch.nan)
            pool.v(layer).fill_(torch.nan)
    prompts = tiny.prompts(3, longest=40, seed=3)
    for prompt, request in zip(prompts, engine.generate(prompts, PARAMS), strict=True):
        assert request.output == tiny.greedy(model, prompt, NEW_TOKENS)[0]


@pytest.mark.parametrize("name", ["phi3-longrope", "phi3-longrope-window", "llama"])
def test_longrope_is_a_forward_pass_over_every_prefix(
    name: str, device: str, logits_of: dict[Request, list[Tensor]]
) -> None:
    # A llama that generates with the library's cache mixes both rotations: only a pass over the
    # whole prefix tells what the model means.
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + n for n in range(8)],
        "original_max_position_embeddings": 40,
    }
    model = tiny.build(name, **({"rope_parameters": rope} if name == "llama" else {})).to(device)
    pooled = PooledModel(tiny.copy_of(model))
    assert (pooled.spec.rotary_switch, pooled.spec.max_position) == (40, 256)
    engine = Engine(pooled, pool_tokens=192, max_requests=4, max_batch_tokens=17)
    # Short throughout; past the switch in the answer, with its first and its last token; at the
    # switch, past it and far past it from the start.
    prompts = [[n + 1] * 3 + prompt for n, prompt in enumerate(tiny.prompts(7, longest=1, seed=4))]
    lengths = [8, 24, 39, 17, 40, 41, 90]
    prompts = [(prompt * 30)[:length] for prompt, length in zip(prompts, lengths, strict=True)]
    requests = run_with_joins(engine, prompts)
    for prompt, request in zip(prompts, requests, strict=True):
        tokens, logits = tiny.greedy_uncached(model, prompt, NEW_TOKENS)
        assert request.output == tokens
        torch.testing.assert_close(
            torch.stack(logits_of[request]), logits, **TOLERANCE[torch.float32]
        )
    engine.cache.allocator.check_no_leak()


def test_a_request_is_computed_anew_once_when_its_rotation_changes() -> None:
    engine = Engine(PooledModel(tiny.build("phi3-longrope")), pool_tokens=512)
    engine.generate([[1] * 30, [2] * 60, [3] * 16], PARAMS)
    # 30 + 24 passes 40 tokens: the 41 that it then has are computed again, but its last answer not
    # at all; 16 + 24 is 40 and does not.
    speed = engine.throughput
    computed = speed.prefill_tokens + speed.decode_tokens
    assert computed == (30 + 23) + 40 + (60 + 23) + (16 + 23)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3-beside-vision", "final_logit_softcapping", 30.0),
    ],
)
def test_what_cannot_be_expressed_is_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(RopoolError, match=f"{option} is {value}; allowed: "):
        PooledModel(tiny.build(name, **{option: value}))


@pytest.mark.parametrize("name", ["mistral-window", "phi3", "qwen2-some-windows"])
def test_a_window_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(RopoolError, match="sliding_window is 0; allowed: None or at least 1"):
        PooledModel(tiny.build(name, sliding_window=0))


def test_a_model_in_training_is_evaluated() -> None:
    model = tiny.build("gpt_neox", hidden_dropout=0.5).train()
    pooled = PooledModel(model)
    answers = [Engine(pooled, pool_tokens=64).generate([[1, 2, 3]], PARAMS) for _ in range(2)]
    assert answers[0][0].output == answers[1][0].output


def test_a_family_that_is_not_covered_is_named() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(
        RopoolError, match=f"'gpt2' is not covered; covered: {', '.join(sorted(FAMILIES))}"
    ):
        PooledModel(model)


ROPE = {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    "name, rope, message",
    [
        ("llama", {**ROPE, "rope_type": "spiral"}, "rope_type is 'spiral'; allowed: default, dyn"),
        ("llama", {**ROPE, "rope_type": "default", "twist": 2}, "twist is 2, with rope_type"),
        ("llama", {"rope_type": "default"}, "rope_theta is missing"),
        (
            # Its base grows from another length than the context: with every token of a request.
            "llama",
            {
                **ROPE,
                "rope_type": "dynamic",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
            },
            "original_max_position_embeddings is 128; allowed: with rope_type 'dynamic'",
        ),
        (
            "phi3",
            {**tiny.LONGROPE["rope_parameters"], "short_factor": [1.0]},
            r"short_factor is .* R/2 \(6\) numbers",
        ),
        (
            "qwen2_vl",
            {**ROPE, "rope_type": "default", "mrope_section": [2, 2, 2]},
            "mrope_section is .* sum to R/2",
        ),
        (
            "qwen2_vl",
            {
                **ROPE,
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
                "mrope_section": [2, 3, 3],
            },
            "M-RoPE is covered .* without LongRoPE only",
        ),
    ],
)
def test_a_rotation_that_cannot_be_expressed_is_refused(
    name: str, rope: dict[str, Any], message: str
) -> None:
    model = tiny.build(name)
    model.config.get_text_config().rope_parameters = rope
    with pytest.raises(RopoolError, match=message) as caught:
        PooledModel(model)
    assert "\n" not in str(caught.value)


def test_dynamic_ntk_is_exact_in_the_whole_context() -> None:
    model = tiny.build("llama", rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 4.0})
    pooled = PooledModel(tiny.copy_of(model))
    assert (pooled.spec.max_position, pooled.spec.rotary_switch) == (256, None)
    engine = Engine(pooled, pool_tokens=256)
    draw = random.Random(5)
    prompt = [draw.randrange(tiny.VOCAB) for _ in range(256 - NEW_TOKENS)]
    assert engine.generate([prompt], PARAMS)[0].output == tiny.greedy(model, prompt, NEW_TOKENS)[0]
    with pytest.raises(RopoolError, match="the model's context holds 256"):
        engine.add([1] * 256)


def test_a_window_of_the_whole_context_is_none() -> None:
    assert PooledModel(tiny.build("phi3", sliding_window=256)).spec.windows == (None,) * 3
    assert PooledModel(tiny.build("phi3", sliding_window=255)).spec.windows == (255,) * 3
