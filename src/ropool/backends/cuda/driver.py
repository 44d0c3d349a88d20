"""The one driver call of a launch, through ctypes: a prepared frame is filled with addresses and
passed on, which costs a third of building the launch anew through a general binding."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

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

    def frozen(self, addresses: Sequence[int]) -> Callable[[], None]:
        """A launch with these addresses and no arguments."""
        content = bytearray(self._content)
        self._fill(content, _ADDRESSES_AT, *addresses)
        whole = bytes(content)
        frames = [_Frame(whole)]
        start = self._start

        def launch() -> None:
            try:
                frame = frames.pop()
            except IndexError:
                frame = _Frame(whole)
            start(frame)
            frames.append(frame)

        return launch

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
