"""The one driver call of a launch: a prepared frame is filled with addresses and passed on, by
compiled code (csrc/python/cuda_launch.hpp), or through ctypes where that is not there or refuses.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_eager: Any
"""The compiled extension, `None` where it is not installed."""
try:
    from ropool import _eager
except ImportError:
    _eager = None

_SERIALIZATION_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_ATTRIBUTE_BYTES = 72
_INVALID_CONTEXT = 201
_STREAM_AT = 32
_ADDRESSES_AT = 56
"""Offsets in a frame: a CUlaunchConfig of 56 bytes, with the stream in it; then the kernel's
parameters, addresses first."""


@functools.cache
def library() -> Any:
    """The CUDA driver. Raises `OSError` without one."""
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, call: str) -> None:
    """Raise `RuntimeError` unless `status` is success."""
    if status:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise RuntimeError(f"ropool: {call} failed: {reason} ({status})")


def _torch_cuda() -> Any:
    """PyTorch's own library for CUDA. Raises `OSError` where it is kept elsewhere."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))


@functools.cache
def _entry_points() -> dict[str, int] | None:
    """Addresses of what a launch in compiled code calls, `None` where one of them is missing or
    there is no compiled code."""
    if _eager is None:
        return None
    try:
        functions = {
            "cuLaunchKernelEx": library().cuLaunchKernelEx,
            "cuCtxGetDevice": library().cuCtxGetDevice,
            "aoti_torch_get_current_cuda_stream": _torch_cuda().aoti_torch_get_current_cuda_stream,
        }
    except (AttributeError, OSError):
        return None
    return {name: ctypes.cast(f, ctypes.c_void_p).value or 0 for name, f in functions.items()}


def function_of(kernel: Any) -> int:
    """The loaded function of a kernel in the current context."""
    function = ctypes.c_void_p()
    handle = ctypes.c_void_p(int(kernel.handle))
    check(library().cuKernelGetFunction(ctypes.byref(function), handle), "cuKernelGetFunction")
    check(library().cuFuncLoad(function), "cuFuncLoad")
    assert function.value is not None
    return function.value


@functools.cache
def _dependent_launch() -> ctypes.Array[ctypes.c_char]:
    """The attribute list that lets a kernel start while the one before it drains."""
    attribute = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
    struct.pack_into("=I4xi", attribute, 0, _SERIALIZATION_ATTRIBUTE, 1)
    return attribute


class _Frame:
    """Memory of one launch in flight on the host: configuration and parameters."""

    def __init__(self, content: bytes) -> None:
        self.memory = ctypes.create_string_buffer(content, len(content))
        at = ctypes.addressof(self.memory)
        self.config = ctypes.c_void_p(at)
        self.stream = ctypes.c_uint64.from_buffer(self.memory, _STREAM_AT)
        self.parameters = (ctypes.c_void_p * 1)(at + _ADDRESSES_AT)


class Launcher:
    """Launches one kernel with one grid and one set of scalars; addresses and stream change from
    call to call."""

    def __init__(
        self,
        function: int,
        device: int,
        grid: int,
        block: int,
        addresses: int,
        scalars: Sequence[int],
        dependent: bool,
    ) -> None:
        attributes = ctypes.addressof(_dependent_launch()) if dependent else 0
        self._content = (
            struct.pack("=7I4xQQQ", grid, 1, 1, block, 1, 1, 0, 0, attributes, int(dependent))
            + bytes(8 * addresses)
            + struct.pack(f"={len(scalars)}q", *scalars)
        )
        self._function = ctypes.c_void_p(function)
        self._device = device
        # Frames not in use; taking and returning one is atomic, so threads never share one.
        self._frames = [_Frame(self._content)]
        self._fill = struct.Struct(f"={addresses}Q").pack_into
        self._call = library().cuLaunchKernelEx

    def __call__(self, addresses: Sequence[int]) -> None:
        """Launch on PyTorch's current stream of the device."""
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = _Frame(self._content)
        self._fill(frame.memory, _ADDRESSES_AT, *addresses)
        self._start(frame)
        self._frames.append(frame)

    def native(self, operands: Sequence[tuple[int, int]], addresses: Sequence[int] = ()) -> Any:
        """This launch for compiled code (csrc/python/native.hpp), or `None` where there is none.
        For each address, `operands` has the index of the tensor that it is of and the bits of it
        that have to be 0, unless the `addresses` themselves are given."""
        entry_points = _entry_points()
        if entry_points is None:
            return None
        frame = bytearray(self._content)
        if addresses:
            self._fill(frame, _ADDRESSES_AT, *addresses)
        return _eager.cuda_launch(
            entry_points,
            self._function.value,
            self._device,
            bytes(frame),
            _STREAM_AT,
            _ADDRESSES_AT,
            operands,
        )

    def frozen(self, addresses: Sequence[int]) -> Callable[[], None]:
        """A launch with these addresses and no arguments."""
        launch = functools.partial(self, addresses)
        native = self.native((), addresses)
        return launch if native is None else _eager.frozen(native, launch)

    def _start(self, frame: _Frame) -> None:
        device = self._device
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                self._start(frame)
            return
        frame.stream.value = torch._C._cuda_getCurrentRawStream(device)
        status = self._call(frame.config, self._function, frame.parameters, None)
        if status == _INVALID_CONTEXT:
            # A thread that has not used CUDA yet.
            torch.cuda.set_device(device)
            status = self._call(frame.config, self._function, frame.parameters, None)
        if status:
            check(status, "cuLaunchKernelEx")
