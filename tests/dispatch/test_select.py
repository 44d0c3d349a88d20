"""Which kernel is chosen: the best that covers the call, or exactly the one asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import ropool
from ropool.dispatch import (
    BackendSpec,
    Device,
    KernelSpec,
    Key,
    NoKernelError,
    cache,
    explain,
    registry,
    select,
    settings,
)

CPU = Device("cpu")
KEY = Key(op="rope_", dtype="float32", heads_q=2, heads_kv=1, head_dim=8, rotary_dim=8)
runs: list[str] = []


def fake_available() -> None:
    return None


def fake_unavailable() -> str:
    return "this machine has no abacus"


def fake_supports(key: Key, device: Device) -> str | None:
    return None if key.dtype == "float32" else f"no {key.dtype}"


def fake_bind(key: Key, args: tuple, options: object):  # type: ignore[no-untyped-def]
    return lambda args: runs.append("fake")


@pytest.fixture
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backend `fake` that is preferred and serves float32, and one that is not available."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    monkeypatch.setattr(registry, "_unavailable", {})
    here = __name__
    for name, available, priority in (
        ("fake", "fake_available", 1000),
        ("abacus", "fake_unavailable", 2000),
    ):
        registry.register_backend(BackendSpec(name, f"{here}:{available}"))
        registry.register(
            KernelSpec(
                "rope_",
                "k",
                name,
                f"{here}:fake_bind",
                ("cpu",),
                f"{here}:fake_supports",
                priority,
            )
        )
    runs.clear()
    yield
    cache.clear()


def rope_arguments(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    q = torch.ones(3, 2, 8, dtype=dtype)
    return q, q[:, :1].clone(), torch.ones(4, 8), torch.zeros(3, dtype=torch.int64)


def test_the_preferred_kernel_that_covers_the_call_is_chosen(fake_backend: None) -> None:
    assert select("rope_", CPU, KEY).label == "fake/k"
    ropool.rope_(*rope_arguments(torch.float32))
    assert runs == ["fake"]
    assert cache.chosen["rope_"] == "fake/k"


def test_a_choice_that_other_settings_have_overtaken_is_not_remembered(
    fake_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another thread changes them while this one chooses."""
    with ExitStack() as stack:

        def overtaken(*question: Any) -> Any:
            reports = explain(*question)
            stack.enter_context(settings.override(backend="reference"))
            return reports

        monkeypatch.setattr(sys.modules["ropool.dispatch.select"], "explain", overtaken)
        assert select("rope_", CPU, KEY).label == "fake/k"
        monkeypatch.undo()
        assert select("rope_", CPU, KEY).label == "reference/rope"


def test_an_uncovered_call_falls_through(fake_backend: None) -> None:
    ropool.rope_(*rope_arguments(torch.bfloat16))
    assert runs == []


def test_an_explicit_backend_never_falls_back(fake_backend: None) -> None:
    with pytest.raises(NoKernelError, match=r"ropool.rope_: no kernel .*fake/k: no bfloat16"):
        ropool.rope_(*rope_arguments(torch.bfloat16), backend="fake")
    with pytest.raises(NoKernelError, match="this machine has no abacus"):
        ropool.rope_(*rope_arguments(torch.float32), backend="abacus")
    with settings.override(backend="fake"), pytest.raises(NoKernelError, match="no bfloat16"):
        ropool.rope_(*rope_arguments(torch.bfloat16))


def test_an_explicit_backend_without_a_kernel_of_the_op_raises(fake_backend: None) -> None:
    k = torch.ones(3, 1, 8)
    pool = torch.zeros(4, 1, 8)
    slots = torch.arange(3)
    with pytest.raises(NoKernelError, match="backend fake has no kernel"):
        ropool.store_kv_(k, k, pool, pool.clone(), slots, layout="slots", backend="fake")


def test_an_unknown_backend_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"ropool.rope_: backend 'abacus' is unknown; known: cpu"):
        ropool.rope_(*rope_arguments(torch.float32), backend="abacus")


def test_explain_lists_every_kernel_with_a_reason(fake_backend: None) -> None:
    reports = {r.kernel.label: r for r in explain("rope_", CPU, KEY)}
    assert reports["fake/k"].chosen
    assert reports["abacus/k"].reason == "this machine has no abacus"
    assert reports["reference/rope"].reason == "fake/k is preferred"
    gpu = Device("cuda", "NVIDIA H200", "sm_90")
    reports = {r.kernel.label: r for r in explain("rope_", gpu, KEY)}
    assert reports["fake/k"].reason == "runs on cpu, not on cuda"


def test_public_explain_runs_nothing_and_checks_the_call() -> None:
    q, k, table, positions = rope_arguments(torch.float32)
    before = q.clone()
    explanation = ropool.explain("rope_", q, k, table, positions, backend="reference")
    assert [r.kernel.label for r in explanation if r.chosen] == ["reference/rope"]
    assert "chosen" in str(explanation)
    assert torch.equal(q, before)
    with pytest.raises(ValueError, match="explain: op is 'rope'; known: rope_,"):
        ropool.explain("rope", q, k, table, positions)
    with pytest.raises(ValueError, match="positions has 2 tokens, q has 3"):
        ropool.explain("rope_", q, k, table, positions[:2])


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ROPOOL_BACKEND", "abacus", "'abacus' .ROPOOL_BACKEND. is unknown; known: cpu, reference"),
        ("ROPOOL_CHECK", "yes", "ROPOOL_CHECK is 'yes'; allowed: 0, 1"),
    ],
)
def test_a_bad_environment_value_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(settings, "_current", None)
    with pytest.raises(ValueError, match=message):
        ropool.rope_(*rope_arguments(torch.float16))


def test_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPOOL_BACKEND", "reference")
    monkeypatch.setenv("ROPOOL_CHECK", "1")
    monkeypatch.setattr(settings, "_current", None)
    cache.clear()
    assert settings.current() == settings.Settings("reference", True)
    ropool.rope_(*rope_arguments(torch.float32))
    assert cache.chosen["rope_"] == "reference/rope"
    cache.clear()


def test_decisions_are_kept_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LAUNCH_LIMIT", 8)
    cache.clear()
    for tokens in range(1, 30):
        q = torch.ones(tokens, 2, 8)
        ropool.rope_(q, None, torch.ones(4, 8), torch.zeros(tokens, dtype=torch.int32))
        assert cache.launches() <= 8
