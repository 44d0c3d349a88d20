"""Runs SPIR-V on an OpenCL device that reads the host's memory in place, such as Intel's CPU one.

Bindings to the few functions of OpenCL 3.0 that this takes; `intel-opencl-rt` brings the library.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ALL_DEVICES = 0xFFFFFFFF
_SVM_CAPABILITIES, _SVM_ANY_HOST_MEMORY = 0x1053, 1 << 3
_DEVICE_NAME = 0x102B
_BUILD_LOG = 0x1183
_HANDLES = ("clCreateContext", "clCreateCommandQueueWithProperties", "clCreateProgramWithIL")
_SCALARS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}

_HEADER_BYTES = 20
_EXTENSION, _EXECUTION_MODE, _CAPABILITY = 10, 16, 17
_KERNEL_ATTRIBUTES, _ATTRIBUTE_MODES = 5892, range(5893, 5897)


def _without_kernel_attributes(spirv: bytes) -> bytes:
    """A module without SPV_INTEL_kernel_attributes: bounds of the work group, which change nothing
    in what a kernel computes and which the CPU device does not know."""
    kept, at = spirv[:_HEADER_BYTES], _HEADER_BYTES
    while at < len(spirv):
        code, words = struct.unpack_from("<HH", spirv, at)
        instruction = spirv[at : at + 4 * words]
        at += 4 * words
        numbers = struct.unpack(f"<{words}I", instruction)
        if not (
            (code == _CAPABILITY and numbers[1] == _KERNEL_ATTRIBUTES)
            or (code == _EXECUTION_MODE and numbers[2] in _ATTRIBUTE_MODES)
            or (code == _EXTENSION and b"SPV_INTEL_kernel_attributes" in instruction)
        ):
            kept += instruction
    return kept


class Device:
    """The first device of the first platform."""

    def __init__(self) -> None:
        folder = Path(sys.prefix, "lib")
        os.environ.setdefault("OCL_ICD_FILENAMES", str(folder / "libintelocl.so"))
        self._cl = ctypes.CDLL(str(folder / "libOpenCL.so"))
        for name in (*_HANDLES, "clCreateKernel"):
            getattr(self._cl, name).restype = ctypes.c_void_p
        platform, self._device = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("clGetPlatformIDs", 1, ctypes.byref(platform), None)
        kind = ctypes.c_ulong(_ALL_DEVICES)
        self._call("clGetDeviceIDs", platform, kind, 1, ctypes.byref(self._device), None)
        if not self._info(_SVM_CAPABILITIES)[0] & _SVM_ANY_HOST_MEMORY:
            raise RuntimeError("the OpenCL device does not share the host's memory")
        self.name = self._info(_DEVICE_NAME).rstrip(b"\0").decode()
        one = ctypes.byref(self._device)
        self._context = self._make("clCreateContext", None, 1, one, None, None)
        self._queue = self._make(
            "clCreateCommandQueueWithProperties", self._context, self._device, None
        )

    def kernel(self, spirv: bytes, name: str) -> ctypes.c_void_p:
        """Compile a kernel."""
        spirv = _without_kernel_attributes(spirv)
        size = ctypes.c_size_t(len(spirv))
        program = self._make("clCreateProgramWithIL", self._context, spirv, size)
        if self._cl.clBuildProgram(program, 0, None, None, None, None):
            log = ctypes.create_string_buffer(1 << 16)
            self._cl.clGetProgramBuildInfo(
                program, self._device, _BUILD_LOG, ctypes.c_size_t(len(log)), log, None
            )
            raise RuntimeError(f"{self.name} does not take the SPIR-V:\n{log.value.decode()}")
        return self._make("clCreateKernel", program, name.encode())

    def run(
        self,
        kernel: ctypes.c_void_p,
        arguments: Sequence[tuple[str, Any]],
        local_bytes: int,
        groups: int,
        threads: int,
    ) -> None:
        """Launch and wait. `arguments`: Triton's type and the value of each, an address for a
        pointer; behind them the kernel takes its local memory, if it uses any."""
        for i, (kind, value) in enumerate(arguments):
            if kind.startswith("*"):
                self._call("clSetKernelArgSVMPointer", kernel, i, ctypes.c_void_p(value))
            else:
                scalar = _SCALARS[kind](value)
                size = ctypes.c_size_t(ctypes.sizeof(scalar))
                self._call("clSetKernelArg", kernel, i, size, ctypes.byref(scalar))
        if local_bytes:
            size = ctypes.c_size_t(local_bytes)
            self._call("clSetKernelArg", kernel, len(arguments), size, None)
        total, local = ctypes.c_size_t(groups * threads), ctypes.c_size_t(threads)
        self._call(
            "clEnqueueNDRangeKernel",
            *(self._queue, kernel, 1, None, ctypes.byref(total), ctypes.byref(local)),
            *(0, None, None),
        )
        self._call("clFinish", self._queue)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cl, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} returned {code}")

    def _make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        code = ctypes.c_int32()
        handle = getattr(self._cl, name)(*arguments, ctypes.byref(code))
        if code.value:
            raise RuntimeError(f"{name} returned {code.value}")
        return ctypes.c_void_p(handle)

    def _info(self, what: int) -> bytes:
        size = ctypes.c_size_t()
        self._call("clGetDeviceInfo", self._device, what, 0, None, ctypes.byref(size))
        value = ctypes.create_string_buffer(size.value)
        self._call("clGetDeviceInfo", self._device, what, size, value, None)
        return value.raw
