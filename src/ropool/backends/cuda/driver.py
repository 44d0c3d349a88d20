"""The one driver call of a launch, through ctypes: a prepared frame is filled with addresses and
passed on, which costs a third of building the launch anew through a general binding."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch

_SERIALIZATION_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_ATTRIBUTE_BYTES = 72
_INVALID_CONTEXT = 201
_STREAM_AT = 32
_PARAMETERS_AT = 56
"""Offsets in a frame: a CUlaunchConfig of 56 bytes, from byte 32 on stream, attributes and their
number; then the kernel's parameters, addresses first."""


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
        self.parameters = (ctypes.c_void_p * 1)(at + _PARAMETERS_AT)


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
        self._attributes = (attributes, int(dependent))
        self._fill = struct.Struct(f"=QQQ{addresses}Q").pack_into
        self._call = library().cuLaunchKernelEx

    def __call__(self, addresses: Sequence[int]) -> None:
        """Launch on PyTorch's current stream of the device."""
        device = self._device
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                self(addresses)
            return
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = _Frame(self._content)
        stream = torch._C._cuda_getCurrentRawStream(device)
        self._fill(frame.memory, _STREAM_AT, stream, *self._attributes, *addresses)
        status = self._call(frame.config, self._function, frame.parameters, None)
        if status == _INVALID_CONTEXT:
            # A thread that has not used CUDA yet.
            torch.cuda.set_device(device)
            status = self._call(frame.config, self._function, frame.parameters, None)
        self._frames.append(frame)
        if status:
            check(status, "cuLaunchKernelEx")
