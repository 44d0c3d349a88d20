"""What a call hands to the driver, in compiled code and in Python, seen by functions that stand for
the driver's and PyTorch's: tensors are on the CPU, and no GPU is needed."""

from __future__ import annotations

import ctypes
import math
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ropool
from ops.calls import Case, arguments
from ropool.backends.cuda import compile, driver, launch
from ropool.backends.cuda.choose import shape_of
from ropool.backends.cuda.grid import grid_of
from ropool.dispatch import cache
from ropool.ops import _launches, _op
from ropool.ops._call import described

OPS = list(launch.ARGUMENTS)
HOME = -1
"""The index of the CPU, which stands for the tensors' device."""
INVALID_CONTEXT = 201
FIRST_KERNEL = 0xF000


@dataclass(frozen=True)
class Launched:
    """One launch as the driver gets it."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    attributes: bytes
    kernel: str
    """Its source."""
    parameters: tuple[int, ...]


class Fakes:
    """The driver, the compiler, and what PyTorch says of a GPU and its state."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.in_python = 0
        """Times that Python asked for the stream."""
        self.stream = 0xABCD_0000_1234
        self.device = HOME
        self.switched: list[int] = []
        self.statuses: list[int] = []
        """Of the next launches; success thereafter."""
        self.without_context = False
        self.during: Callable[[], object] = lambda: None
        self.words = 0
        """How many parameters of 8 bytes the kernel has."""
        self.kernels: list[str] = []

        def prototype(*types: Any) -> Any:
            return ctypes.CFUNCTYPE(ctypes.c_int, *types)

        pointer, address = ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
        self.cuLaunchKernelEx = prototype(address, address, pointer, address)(self._launch)
        self.cuCtxGetDevice = prototype(ctypes.POINTER(ctypes.c_int))(self._context)
        self.aoti_torch_get_current_cuda_stream = prototype(ctypes.c_int32, pointer)(self._stream)
        self.cuGetErrorString = prototype(ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))(self._text)

    def _launch(self, config: int, kernel: int, parameters: Any, extra: int | None) -> int:
        self.during()
        status = self.statuses.pop(0) if self.statuses else 0
        if status:
            return status
        assert extra is None
        *sizes, shared, stream, attributes, count = struct.unpack(
            "=7I4xQQQ", ctypes.string_at(config, 56)
        )
        words = ctypes.string_at(parameters[0], 8 * self.words)
        self.launched.append(
            Launched(
                tuple(sizes[:3]),
                tuple(sizes[3:]),
                shared,
                stream,
                ctypes.string_at(attributes, 72 * count) if count else b"",
                self.kernels[kernel - FIRST_KERNEL],
                struct.unpack(f"={self.words}q", words),
            )
        )
        return 0

    def _context(self, device: Any) -> int:
        device[0] = self.device
        return INVALID_CONTEXT if self.without_context else 0

    def _stream(self, device: int, stream: Any) -> int:
        assert device == HOME
        stream[0] = self.stream
        return 0

    def _text(self, status: int, text: Any) -> int:
        text[0] = b"something happened"
        return 0

    def stream_in_python(self, device: int) -> int:
        assert device == HOME
        self.in_python += 1
        return self.stream

    def use_device(self, device: int) -> Any:
        """`torch.cuda.device`."""
        fakes = self

        class Guard:
            def __enter__(self) -> None:
                self.before, fakes.device = fakes.device, device
                fakes.switched.append(device)

            def __exit__(self, *error: object) -> None:
                fakes.device = self.before

        return Guard()

    def set_device(self, device: int) -> None:
        self.device, self.without_context = device, False
        self.switched.append(device)

    def load(self, text: str, arch: str) -> int:
        self.kernels.append(text)
        return FIRST_KERNEL + len(self.kernels) - 1

    def made(self) -> list[Launched]:
        """The launches since the last time."""
        made, self.launched = self.launched, []
        return made


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["sm_90", "sm_80"])
def fakes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    """Every op is bound by the `cuda` backend, for a GPU of this capability."""
    made = Fakes()
    major, minor = request.param
    gpu = SimpleNamespace(major=major, minor=minor, multi_processor_count=132, name="none")
    monkeypatch.setattr(driver, "library", lambda: made)
    monkeypatch.setattr(driver, "_torch_cuda", lambda: made)
    monkeypatch.setattr(driver, "function_of", int)
    monkeypatch.setattr(compile, "load", made.load)
    monkeypatch.setattr(launch, "_functions", {})
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: made.device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", made.stream_in_python, raising=False)
    monkeypatch.setattr(torch.cuda, "device", made.use_device)
    monkeypatch.setattr(torch.cuda, "set_device", made.set_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: request.param)
    kernel = SimpleNamespace(target="ropool.backends.cuda.launch:bind", label="cuda/fake")
    monkeypatch.setattr(_op, "select", lambda *_: kernel)
    driver._entry_points.cache_clear()
    cache.clear()
    yield made
    driver._entry_points.cache_clear()
    cache.clear()


@pytest.fixture
def compiled() -> None:
    if _launches.reader() is None:
        pytest.skip("compiled code cannot read tensors here")


def call_arguments(op: str, tokens: int = 6, seed: int = 0) -> dict[str, Any]:
    """Of a call whose tensors change with `seed` alone."""
    case = Case(op=op, tokens=tokens, seed=seed)
    if op.startswith("rope_store"):
        case = replace(case, q_out="model", offset_dtype="int32", padding_slot=3)
    # Compiled code takes names as they stand in a source.
    args = {sys.intern(name): value for name, value in arguments(case).items()}
    return args | {"norm_eps": 1e-5} if "norm_eps" in args else args


def expected(fakes: Fakes, op: str, args: dict[str, Any], shift: int = 0) -> Launched:
    """What a call is to hand over, where every address is `shift` bytes past a vector."""
    call = described("test", op, (), args)
    key, options = call.key()
    align = math.gcd(16, shift)
    found = launch.describe(key, call.tensors, options, lambda _: align)
    major, minor = torch.cuda.get_device_capability(HOME)
    shape = shape_of(found, f"sm_{major}{minor}", 132, "none")
    grid = grid_of(found, shape)
    addresses = [call.tensors[index].data_ptr() for _, index in found.pointers]
    fakes.words = len(addresses) + len(found.scalars)
    return Launched(
        (grid.blocks, 1, 1),
        (shape.threads, 1, 1),
        0,
        fakes.stream,
        struct.pack("=I4xi", 6, 1).ljust(72, b"\0") if major >= 9 else b"",
        launch.source_of(found, shape, grid),
        (*addresses, *found.scalars.values()),
    )


def public(op: str, args: dict[str, Any]) -> Callable[[], None]:
    return lambda: getattr(ropool, op)(**args)


@pytest.mark.parametrize("op", OPS)
def test_compiled_code_launches_what_python_does(compiled: None, fakes: Fakes, op: str) -> None:
    """The first call comes from Python; equal ones, on other tensors and other streams, and plans
    come from compiled code."""
    for seed in range(3):
        args = call_arguments(op, seed=seed)
        call, plan = public(op, args), ropool.plan(op, **args)
        for run in (call, plan):
            fakes.stream += 16
            wanted = expected(fakes, op, args)
            run()
            assert fakes.made() == [wanted]
    assert fakes.in_python == 1
    assert len(fakes.kernels) == 1


@pytest.mark.parametrize("op", OPS)
def test_without_compiled_code(fakes: Fakes, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_eager", None)
    args = call_arguments(op)
    wanted = expected(fakes, op, args)
    for run in (public(op, args), public(op, args), ropool.plan(op, **args)):
        run()
        assert fakes.made() == [wanted]
    assert fakes.in_python == 3


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_are_no_launch(fakes: Fakes, op: str) -> None:
    args = call_arguments(op, tokens=0)
    for run in (public(op, args), public(op, args), ropool.plan(op, **args)):
        run()
    assert not fakes.made()
    assert not fakes.kernels


def shifted(args: dict[str, Any], size: int) -> dict[str, Any]:
    """The same tensors `size` bytes past a multiple of 16."""
    moved = dict(args)
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            skip = size // value.itemsize
            storage = torch.zeros(value.numel() * 4 + 64, dtype=value.dtype)
            at = -storage.data_ptr() % 16 // value.itemsize + skip
            moved[name] = storage.as_strided(value.shape, value.stride(), at)
    return moved


@pytest.mark.parametrize("op", OPS)
def test_an_odd_address_gets_a_kernel_of_its_own(compiled: None, fakes: Fakes, op: str) -> None:
    """Whichever address comes first, and without that aligned ones lose theirs."""
    whole = call_arguments(op)
    odd = shifted(whole, 8)
    for args, shift in ((odd, 8), (whole, 0), (odd, 8), (whole, 0)):
        for run in (public(op, args), ropool.plan(op, **args)):
            wanted = expected(fakes, op, args, shift)
            run()
            assert fakes.made() == [wanted]
    assert len(fakes.kernels) == 2
    fakes.in_python = 0
    public(op, odd)()
    assert fakes.in_python == 1
    public(op, whole)()
    assert fakes.in_python == 1
    one = next(name for name in odd if isinstance(odd[name], torch.Tensor) and odd[name].ndim > 2)
    fakes.made()
    public(op, whole | {one: odd[one]})()
    [launched] = fakes.made()
    assert launched.kernel != expected(fakes, op, whole).kernel


def test_an_index_needs_the_alignment_of_its_elements_alone(compiled: None, fakes: Fakes) -> None:
    whole = call_arguments("rope_")
    odd = shifted(whole, 8)
    for args in (whole, whole | {"positions": odd["positions"]}):
        wanted = expected(fakes, "rope_", args)
        public("rope_", args)()
        assert fakes.made() == [wanted]
    assert fakes.in_python == 1


@pytest.mark.parametrize("op", OPS)
def test_another_device_is_left_as_it_is(compiled: None, fakes: Fakes, op: str) -> None:
    args = call_arguments(op)
    plan = ropool.plan(op, **args)
    wanted = expected(fakes, op, args)
    public(op, args)()
    fakes.made()
    fakes.switched.clear()
    fakes.device = 1
    at: list[int] = []
    fakes.during = lambda: at.append(fakes.device)
    for run in (public(op, args), plan):
        run()
        assert fakes.made() == [wanted]
    assert at == fakes.switched == [HOME, HOME]
    assert fakes.device == 1


def test_a_thread_that_never_used_cuda(compiled: None, fakes: Fakes) -> None:
    args = call_arguments("rope_")
    call, plan = public("rope_", args), ropool.plan("rope_", **args)
    wanted = expected(fakes, "rope_", args)
    call()
    for run in (call, plan):
        fakes.made()
        fakes.without_context, fakes.statuses = True, [INVALID_CONTEXT]
        run()
        assert fakes.made() == [wanted]
        assert not fakes.without_context


@pytest.mark.parametrize("way", ["call", "plan"])
def test_an_error_of_the_driver_is_raised(compiled: None, fakes: Fakes, way: str) -> None:
    args = call_arguments("rope_store_kv_")
    call = public("rope_store_kv_", args)
    call()
    run = call if way == "call" else ropool.plan("rope_store_kv_", **args)
    fakes.made()
    wanted = expected(fakes, "rope_store_kv_", args)
    fakes.statuses = [700] * 4
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed: something happened"):
            run()
    assert not fakes.made()
    run()
    assert fakes.made() == [wanted]


def test_a_launch_outlives_its_table(compiled: None, fakes: Fakes) -> None:
    """Another thread forgets all launches while one is on its way."""
    args = call_arguments("store_kv_")
    wanted = expected(fakes, "store_kv_", args)
    call = public("store_kv_", args)

    def forget() -> None:
        thread = threading.Thread(target=cache.clear)
        thread.start()
        thread.join()

    for fakes.during in (forget, lambda: None):
        for _ in range(3):
            call()
            assert fakes.made() == [wanted]


def test_the_configuration_is_the_drivers(fakes: Fakes) -> None:
    """As its own bindings lay it out."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    ids = bindings.CUlaunchAttributeID
    attribute = bindings.CUlaunchAttribute()
    attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = bindings.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = 7, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 96, 1, 1
    config.hStream = bindings.CUstream(fakes.stream)
    config.attrs, config.numAttrs = [attribute], 1
    fakes.words = 3
    fakes.kernels.append("")
    ours = driver.Launcher(FIRST_KERNEL, HOME, 7, 96, 2, [5], dependent=True)
    ours([1, 2])
    words = (ctypes.c_int64 * 3)(1, 2, 5)
    pointer = (ctypes.c_void_p * 1)(ctypes.addressof(words))
    fakes.cuLaunchKernelEx(config.getPtr(), FIRST_KERNEL, pointer, None)
    first, second = fakes.made()
    assert first == second
