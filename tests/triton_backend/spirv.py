"""Compiles the kernels to SPIR-V with Intel's compiler and runs that on Intel's OpenCL CPU device.

`make verify-xpu` runs this, since `triton-xpu` and `triton` are two packages with one module:
python -m triton_backend.spirv [compile|run]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ops import grids
from ops.backend import Backend
from ops.calls import check
from ropool.backends.triton import launch
from ropool.backends.triton.call import Call, describe
from ropool.backends.triton.kernel import heads_kernel
from ropool.backends.triton.plan import plan
from ropool.dispatch import registry
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args, BackendSpec, Device, KernelSpec, Launch
from triton_backend import opencl
from triton_backend.machine_code import CASES, PROCESSORS

SUB_GROUPS = (16, 32)
PONTE_VECCHIO = 0x30F000700
"""Intel's number for its Data Center GPU Max."""
BACKEND = Backend("opencl", "cpu")


def compile_for(lanes: int, call: Call, args: Args) -> tuple[Any, launch.ASTSource]:
    """Compile a call for Intel GPUs, with so many lanes a sub-group."""
    facts = {"sub_group_sizes": list(SUB_GROUPS), "architecture": PONTE_VECCHIO}
    target = GPUTarget("xpu", facts, lanes)
    vectored = [args[place] for name, place in call.sources.items() if name in launch.VECTORED]
    aligned = all(map(_aligned, vectored))
    source = launch.source(call, args, aligned)
    options = {"num_warps": call.warps, "threads_per_warp": lanes}
    return triton.compile(source, target=target, options=options), source


def _aligned(tensor: Tensor) -> bool:
    return tensor.device.type == "meta" or tensor.data_ptr() % launch.ALIGNMENT == 0


def compile_all() -> None:
    """The kernels of the table of machine code."""
    for name, case in CASES.items():
        for lanes in SUB_GROUPS:
            key, args, options = case()
            cut = plan(key, args[0].shape[0], lanes, PROCESSORS)
            kernel, _ = compile_for(lanes, describe(key, args, options, cut, True, False), args)
            words = len(kernel.asm["spv"]) // 4
            print(f"{name}, sub-group {lanes}: {words} words of SPIR-V", flush=True)


_device: list[opencl.Device] = []
_lanes = [SUB_GROUPS[0]]
"""What `bind` runs on, and the sub-group that it compiles for."""


def bind(key: Key, args: Args, options: Options) -> Launch:
    """As `ropool.backends.triton.launch:bind`, for tensors in the host's memory."""
    lanes, device = _lanes[0], _device[0]
    cut = plan(key, args[0].shape[0], lanes, PROCESSORS)
    call = describe(key, args, options, cut, True, False)

    def run(args: Args) -> None:
        compiled, source = compile_for(lanes, call, args)
        kernel = device.kernel(compiled.asm["spv"], compiled.metadata.name)
        values = {name: args[place].data_ptr() for name, place in call.sources.items()}
        values |= call.numbers
        named = [(source.signature[name], values.get(name)) for name in heads_kernel.arg_names]
        given = [(kind, value) for kind, value in named if kind != "constexpr"]
        device.run(kernel, given, compiled.metadata.shared, call.grid, call.warps * lanes)

    return run


def available() -> None:
    """It is."""


def supports(key: Key, device: Device) -> None:
    """Everything."""


def run_all() -> None:
    """Every second case of the pairwise grids, with both sub-groups in turn."""
    here = "triton_backend.spirv"
    _device.append(opencl.Device())
    registry.register_backend(BackendSpec(BACKEND.name, f"{here}:available"))
    for op in registry.OPS:
        registry.register(
            KernelSpec(op, op, BACKEND.name, f"{here}:bind", ("cpu",), f"{here}:supports", -2)
        )
    cases = grids.half_of_all()
    for i, case in enumerate(cases):
        _lanes[0] = SUB_GROUPS[i % 2]
        print(case, flush=True)
        check(case, BACKEND)
    print(f"{len(cases)} calls on {_device[0].name} agree with float64")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["triton_backend.spirv"] = sys.modules["__main__"]
    for part in sys.argv[1:] or ("compile", "run"):
        {"compile": compile_all, "run": run_all}[part]()
