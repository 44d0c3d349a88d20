"""The MLX engine answers as `mlx-lm`'s own generation does, alone and in a ragged batch, with the
kernels and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
from mlx_extension.device import use_device  # noqa: E402

use_device()

from mlx_engine import tiny  # noqa: E402
from ropool import dispatch  # noqa: E402
from ropool.engine import CacheScales, SamplingParams  # noqa: E402
from ropool.errors import RopoolError  # noqa: E402
from ropool.mlx.engine import MlxEngine  # noqa: E402
from ropool.mlx.model import MlxModel  # noqa: E402

NEW_TOKENS = 24
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS)
NEEDS_EXTENSION = pytest.mark.skipif(
    dispatch.unavailable("metal") is not None, reason="ropool-metal is not installed"
)
SETTINGS = [pytest.param("1", marks=NEEDS_EXTENSION), "0"]


def pooled(model: Any) -> MlxModel:
    return MlxModel(tiny.copy_of(model), frozenset())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_single_and_ragged(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPOOL_MLX_CUSTOM_ROPE", setting)
    model = tiny.build(name)
    ragged = tiny.prompts(5, longest=60)
    ours = pooled(model)
    # Small chunks and a small pool, so that prompts are cut and requests preempted.
    engine = MlxEngine(ours, pool_tokens=224, max_requests=4, max_batch_tokens=48)
    answers = [request.output for request in engine.generate(ragged, PARAMS)]
    engine.cache.allocator.check_no_leak()
    for prompt, answer in zip(ragged, answers, strict=True):
        assert answer == tiny.greedy(model, prompt, NEW_TOKENS)[0]
    alone = MlxEngine(ours, pool_tokens=128).generate([ragged[0]], PARAMS)[0]
    assert alone.output == answers[0]
    assert (ours.kernels.rope is not None) == (setting == "1")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3-text", "phi3-longrope"])
def test_mlx_lm_batches_alike(name: str) -> None:
    model = tiny.build(name)
    ragged = tiny.prompts(3, longest=30, seed=5)
    requests = MlxEngine(pooled(model), pool_tokens=512).generate(ragged, PARAMS)
    assert [request.output for request in requests] == tiny.batched(model, ragged, NEW_TOKENS)


@NEEDS_EXTENSION
@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_with_the_kernel_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(name)
    ragged = tiny.prompts(3, longest=40, seed=2)
    found: dict[str, list[torch.Tensor]] = {}
    for setting in ("1", "0"):
        monkeypatch.setenv("ROPOOL_MLX_CUSTOM_ROPE", setting)
        engine = MlxEngine(pooled(model), pool_tokens=512, max_batch_tokens=64)
        forward, seen = engine._forward, found.setdefault(setting, [])

        def watched(spans: Any, forward: Any = forward, seen: Any = seen) -> torch.Tensor:
            seen.append(forward(spans))
            return seen[-1]

        monkeypatch.setattr(engine, "_forward", watched)
        engine.generate(ragged, PARAMS)
    assert len(found["1"]) == len(found["0"]) >= NEW_TOKENS
    for with_kernel, without in zip(found["1"], found["0"], strict=True):
        torch.testing.assert_close(with_kernel, without, rtol=1e-4, atol=1e-3)


def test_log_probabilities_are_those_of_mlx_lm() -> None:
    model = tiny.build("llama3-scaled")
    prompt = tiny.prompts(1, longest=50, seed=4)[0]
    _, rows = tiny.greedy(model, prompt, 6)
    engine = MlxEngine(pooled(model), pool_tokens=128)
    seen = []
    forward = engine._forward
    engine._forward = lambda spans: seen.append(forward(spans)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    engine.generate([prompt], SamplingParams(max_new_tokens=6))
    for ours, theirs in zip(seen, rows, strict=True):
        expected = torch.from_numpy(np.array(theirs.astype(mx.float32)).reshape(1, -1))
        torch.testing.assert_close(ours.log_softmax(-1), expected, rtol=1e-4, atol=1e-3)


def test_a_decode_step_is_one_call_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attention, for all requests of like length; and what the step computes is evaluated at
    once, at its end."""
    engine = MlxEngine(pooled(tiny.build("gemma3-text")), pool_tokens=512)
    attention, evaluate, forward = mx.fast.scaled_dot_product_attention, mx.eval, engine._forward
    calls = {"attention": 0, "eval": 0}
    seen: list[tuple[int, dict[str, int]]] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        return call

    def watched(spans: Any) -> torch.Tensor:
        calls.update(attention=0, eval=0)
        logits = forward(spans)
        if all(len(span.tokens) == 1 for span in spans):
            seen.append((len(spans), dict(calls)))
        return logits

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted("attention", attention))
    monkeypatch.setattr(mx, "eval", counted("eval", evaluate))
    monkeypatch.setattr(engine, "_forward", watched)
    ragged = [list(range(1, 1 + length)) for length in (17, 20, 24, 29, 32)]
    engine.generate(ragged, SamplingParams(max_new_tokens=4))
    assert seen and all(one == (5, {"attention": 3, "eval": 1}) for one in seen)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_models(dtype: str) -> None:
    model = tiny.build("llama")
    model.set_dtype(getattr(mx, dtype))
    engine = MlxEngine(pooled(model), pool_tokens=256)
    requests = engine.generate(tiny.prompts(3, longest=20), PARAMS)
    assert all(len(request.output) == NEW_TOKENS for request in requests)
    assert engine.cache.mlx_pool(False).k[0].dtype == getattr(mx, dtype)


def test_the_pool_is_updated_in_place() -> None:
    """Memory does not grow by a pool while it is written."""
    engine = MlxEngine(pooled(tiny.build("llama")), pool_tokens=40_000)
    engine.generate(tiny.prompts(2, longest=20), SamplingParams(max_new_tokens=4))
    pool = engine.cache.mlx_pool(False).nbytes
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    engine.generate(tiny.prompts(2, longest=20), SamplingParams(max_new_tokens=4))
    assert mx.get_peak_memory() - before < pool / 10


def test_stale_pages_are_not_read() -> None:
    model = tiny.build("llama")
    engine = MlxEngine(pooled(model), pool_tokens=256)
    pool = engine.cache.mlx_pool(False)
    for array in (*pool.k, *pool.v):
        array[:] = float("nan")
    pool._written = [True] * pool.pages
    ragged = tiny.prompts(3, longest=40, seed=3)
    for prompt, request in zip(ragged, engine.generate(ragged, PARAMS), strict=True):
        assert request.output == tiny.greedy(model, prompt, NEW_TOKENS)[0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_pool_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RopoolError, match=f"cache_dtype is {dtype}; allowed with the MLX engine: "):
        MlxEngine(pooled(tiny.build("llama")), pool_tokens=64, cache_dtype=dtype)


def test_cache_scales_are_refused() -> None:
    model = pooled(tiny.build("llama"))
    with pytest.raises(RopoolError, match="scales are for an fp8 pool, which the MLX engine does"):
        MlxEngine(model, pool_tokens=64, cache_scales=CacheScales.one(model.spec))


def test_a_family_that_is_not_covered_is_named() -> None:
    class Other:
        class args:  # noqa: N801
            model_type = "mamba"

    with pytest.raises(RopoolError, match="'mamba' is not covered by the MLX engine; covered: lla"):
        MlxModel(Other(), frozenset())
