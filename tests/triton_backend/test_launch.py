"""What a bound launch does before the kernel runs, on a GPU that only pretends to be there."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ops.calls import Case, arguments
from ropool.backends.triton.plan import Plan
from ropool.dispatch import tuning
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.ops._call import described
from triton_backend.machine_code import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Gpu:
    """Stands for the driver and for PyTorch's module of the device; keeps what is done to it."""

    def __init__(self) -> None:
        self.compiled: list[bool] = []
        self.launches: list[tuple[bool, int, tuple[Any, ...]]] = []
        self.capturing = False
        self.current: int | None = None

    def compile(self, source: Any, options: dict[str, int]) -> Any:
        aligned = (source.fn.arg_names.index("k"),) in source.attrs
        self.compiled.append(aligned)
        gpu = self

        class Compiled:
            def __getitem__(self, grid: tuple[int, int, int]) -> Any:
                return lambda *values: gpu.launches.append((aligned, grid[0], values))

        return Compiled()

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(multi_processor_count=100)

    def get_device_name(self, device: torch.device) -> str:
        return "no such GPU"

    def current_device(self) -> int | None:
        return self.current

    @contextlib.contextmanager
    def device(self, index: int | None) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    from triton.backends.compiler import GPUTarget

    from ropool.backends.triton import candidates, launch

    gpu = Gpu()
    target = GPUTarget("hip", "gfx942", 64)
    active = SimpleNamespace(get_current_target=lambda: target)
    for module in (candidates, launch):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "triton", SimpleNamespace(compile=gpu.compile))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    return gpu


def call(**fields: Any) -> tuple[Key, Args, Options]:
    """A call whose tensors all start at multiples of 16 bytes."""
    case = Case(op="store_kv_", tokens=4, **fields)
    args = {
        name: value.clone(memory_format=torch.contiguous_format)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments(case).items()
    }
    made = described("test", case.op, (), args)
    return made.key()[0], made.tensors, made.key()[1]


def moved(args: Args) -> Args:
    """The same call with K at an odd address."""
    k = args[0]
    storage = torch.zeros(k.numel() + 1, dtype=k.dtype)
    return (storage.as_strided(k.shape, k.stride(), 1).copy_(k), *args[1:])


def test_each_alignment_is_compiled_once(gpu: Gpu) -> None:
    from ropool.backends.triton.launch import bind

    key, args, options = call()
    launch = bind(key, args, options)
    for values in (args, moved(args), args, moved(args)):
        launch(values)
    assert gpu.compiled == [True, False]
    assert [aligned for aligned, _, _ in gpu.launches] == [True, False, True, False]
    addresses = {value.data_ptr() for value in args if isinstance(value, torch.Tensor)}
    assert addresses <= set(gpu.launches[0][2])


def test_a_frozen_launch_needs_nothing_more_in_a_capture(gpu: Gpu) -> None:
    from ropool.backends.triton.launch import bind

    key, args, options = call()
    frozen = bind(key, args, options).freeze(odd := moved(args))  # type: ignore[attr-defined]
    gpu.capturing = True
    frozen()
    assert gpu.launches[-1][0] is False
    assert odd[0].data_ptr() in gpu.launches[-1][2]


def test_a_capture_compiles_nothing(gpu: Gpu) -> None:
    from ropool.backends.triton.launch import bind

    key, args, options = call()
    launch = bind(key, args, options)
    gpu.capturing = True
    launch(args)
    with pytest.raises(RuntimeError, match=r"ropool.store_kv_: the kernel for .* warm up"):
        launch(moved(args))
    other_key, other_args, options = call(dtype="float32")
    with pytest.raises(RuntimeError, match=r"ropool.store_kv_: the kernel for .* warm up"):
        bind(other_key, other_args, options)
    assert gpu.compiled == [True]


def test_a_launch_keeps_no_tensor_alive(gpu: Gpu) -> None:
    """Neither of the call that it was bound and compiled for, nor of a later one."""
    from ropool.backends.triton.launch import bind

    key, args, options = call()
    launch = bind(key, args, options)
    launch(args)
    later = moved(args)
    launch(later)
    alive = [weakref.ref(value) for value in (*args, *later) if isinstance(value, torch.Tensor)]
    del args, later
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
    assert launch is not None


def test_sizes_are_compiled_before_they_are_timed(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ropool.backends.triton import candidates
    from ropool.backends.triton.launch import bind

    monkeypatch.setenv("ROPOOL_TUNING", str(tmp_path))
    key, args, options = call()
    choices = candidates.layouts(key, 4)
    candidates.prepare([(key, args, options, choice) for choice in choices], 0)
    compiled = len(gpu.compiled)
    assert 1 < compiled <= len(choices)
    for choice in choices:
        with tuning.trying(choice):
            bind(key, args, options)(args)
    assert len(gpu.compiled) == compiled
    assert len(gpu.launches) == len(choices)


def test_what_is_in_force_is_what_a_call_gets(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ropool.backends.triton import candidates, launch
    from ropool.backends.triton.call import describe

    monkeypatch.setenv("ROPOOL_TUNING", str(tmp_path))
    key, args, options = call()
    described: list[Any] = []
    monkeypatch.setattr(
        launch, "describe", lambda *given: described.append(given[3]) or describe(*given)
    )

    def bound() -> Plan:
        launch.bind(key, args, options)
        return described[-1]

    default, now = bound(), candidates.in_force(key, args, options, 0)
    with tuning.trying(now):
        assert bound() == default
    other = {"warps": 1, "vectors": 8}
    assert now != other
    entries = {tuning.subject(key): {4: other}}
    tuning.write(tuning.Table("triton", "no such GPU", {}, {}, entries), tmp_path)
    assert candidates.in_force(key, args, options, 0) == other
    assert bound() != default


def test_runs_on_the_tensors_device(gpu: Gpu) -> None:
    from ropool.backends.triton.launch import bind

    key, args, options = call()
    launch = bind(key, args, options)
    gpu.current = 3
    launch(args)
    assert gpu.current == 3
    assert len(gpu.launches) == 1


def test_more_programs_than_a_launch_takes(gpu: Gpu) -> None:
    from ropool.backends.triton.launch import bind

    tokens = 2**40
    k = torch.empty_strided((tokens, 1, 64), (0, 0, 1), dtype=torch.bfloat16, device="meta")
    slots = torch.empty_strided((tokens,), (1,), dtype=torch.int64, device="meta")
    pool = torch.empty(8, 1, 1, 64, dtype=torch.bfloat16, device="meta")
    made = described("test", "store_kv_", (), {
        "k": k, "v": k, "k_pool": pool, "v_pool": pool, "slot_mapping": slots,
    })  # fmt: skip
    key, options = made.key()
    with pytest.raises(ValueError, match=r"1099511627776 tokens take .* threads; allowed"):
        bind(key, made.tensors, options)
