"""Bind a call to a compiled kernel and launch it.

Kernels are compiled through `triton.compile` rather than through Triton's own dispatch, which would
look at every argument of every call again: a bound launch knows its strides, so a call costs the
addresses and one test of their alignment.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime import driver

from ropool.backends.triton import interpreting
from ropool.backends.triton.call import Call, describe
from ropool.backends.triton.kernel import heads_kernel
from ropool.backends.triton.plan import default_choice, interpreted_plan, plan
from ropool.dispatch import tuning
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args, Launch
from ropool.dispatch.tuning import Choice

ALIGNMENT = 16
MOST_THREADS = 2**32 - 1
"""Of a launch on AMD GPUs; others take more, and no call on real memory comes near."""
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
"""Everything else, fp8 and byte rows, is stored as bytes."""
VECTORED = ("q", "k", "v", "q_out", "k_pool", "v_pool", "table", "q_weight", "k_weight")
"""Tensors that are read or written in vectors, so that their alignment matters."""
_COUNTS = ("tokens", "max_position", "pool_slots", "window_size", "padding_slot")


def source(call: Call, args: Args, aligned: bool) -> ASTSource:
    """What is to be compiled for `call`; `aligned`: the vectored tensors start at multiples of 16
    bytes. Of a stride the compiler learns its type and the power of two in it, no more, so that
    calls which differ in token counts or pool sizes share their code."""
    signature: dict[str, str] = {}
    constants = dict(call.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(heads_kernel.arg_names):
        number = call.numbers.get(name)
        if name in call.sources:
            signature[name] = _POINTERS.get(args[call.sources[name]].dtype, "*u8")
            if aligned and name in VECTORED:
                attributes[(i,)] = [["tt.divisibility", ALIGNMENT]]
        elif isinstance(number, float):
            signature[name] = "fp32"
        elif number:
            signature[name] = "i32" if -(2**31) <= number < 2**31 else "i64"
            if name not in _COUNTS:
                attributes[(i,)] = [["tt.divisibility", min(number & -number, ALIGNMENT)]]
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, number)
    return ASTSource(heads_kernel, signature, constants, attributes)


_compiled: dict[tuple[Any, ...], Any] = {}


def _compile(key: Key, call: Call, args: Args, aligned: bool, device: int) -> Any:
    """The compiled kernel for the current device, the same object for all calls that share it."""
    src = source(call, args, aligned)
    shared = (device, call.warps, str(src.signature), str(src.constants), str(src.attrs))
    if shared not in _compiled:
        if _capturing(args[0].device):
            raise RuntimeError(
                f"ropool.{key.op}: the kernel for {key.describe()} is not loaded, and cannot be "
                "while a graph is captured; warm up by calling the op once with tensors of the "
                "same shapes, strides and alignment before the capture"
            )
        _compiled[shared] = triton.compile(src, options={"num_warps": call.warps})
    return _compiled[shared]


def _capturing(device: torch.device) -> bool:
    """Whether the current stream's work is recorded into a graph, on GPUs that have them."""
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


def processors_of(device: torch.device) -> int:
    """Multiprocessors, compute units or Xe cores of a GPU."""
    facts = torch.get_device_module(device).get_device_properties(device)
    return int(facts.gpu_subslice_count if device.type == "xpu" else facts.multi_processor_count)


def choice_of(key: Key, first: Tensor) -> Choice | None:
    """What was measured for such calls as one whose first tensor is `first`, on its GPU."""
    name = torch.get_device_module(first.device).get_device_name(first.device)
    return tuning.choice_of("triton", name, key, first.shape[0])


def choice_in_force(key: Key, first: Tensor) -> Choice:
    """The sizes of the programs of such a call, measured or not."""
    lanes, processors = driver.active.get_current_target().warp_size, processors_of(first.device)
    return choice_of(key, first) or default_choice(key, first.shape[0], lanes, processors)


def compile_ahead(key: Key, args: Args, options: Options, choice: Choice) -> None:
    """Compile what a call with the sizes `choice` runs on aligned tensors."""
    device: torch.device = args[0].device
    with torch.get_device_module(device).device(device.index):
        _compile(key, _described(key, args, options, choice), args, True, device.index)


def _described(key: Key, args: Args, options: Options, choice: Choice | None) -> Call:
    """The parameters for a call on the current device whose programs have the sizes `choice`."""
    first: Tensor = args[0]
    target = driver.active.get_current_target()
    sizes = plan(key, first.shape[0], target.warp_size, processors_of(first.device), choice)
    return describe(key, args, options, sizes, True, native_fp8(target))


def native_fp8(target: Any) -> bool:
    """Whether the compiler's own fp8 conversion is used: where it was compared with ours."""
    return target.backend == "cuda" and int(target.arch) >= 89


def bind(key: Key, args: Args, options: Options) -> Launch:
    """The launch of any of the five ops; see `ropool.dispatch.spec.KernelSpec`."""
    if interpreting():
        return _bind_interpreted(key, args, options)
    first: Tensor = args[0]
    module = torch.get_device_module(first.device)
    index: int = first.device.index
    with module.device(index):
        call = _described(key, args, options, choice_of(key, first))
        threads = call.warps * driver.active.get_current_target().warp_size
        if call.grid * threads > MOST_THREADS:
            raise ValueError(
                f"ropool.{key.op}: {first.shape[0]} tokens take {call.grid} programs of "
                f"{threads} threads; allowed: {MOST_THREADS} threads in all"
            )
        runners = {True: _compile(key, call, args, True, index)[(call.grid, 1, 1)]}

    template = [_value(call, name) for name in heads_kernel.arg_names]
    places = [(heads_kernel.arg_names.index(name), call.sources[name]) for name in call.sources]
    vectored = [place for place in places if heads_kernel.arg_names[place[0]] in VECTORED]
    others = [place for place in places if place not in vectored]
    current_device: Callable[[], int] = module.current_device

    def prepared(args: Args) -> tuple[Callable[..., None], list[Any]]:
        values = template.copy()
        bits = 0
        for parameter, i in vectored:
            address = args[i].data_ptr()
            values[parameter] = address
            bits |= address
        for parameter, i in others:
            values[parameter] = args[i].data_ptr()
        aligned = bits % ALIGNMENT == 0
        if aligned not in runners:
            with module.device(index):
                runners[aligned] = _compile(key, call, args, aligned, index)[(call.grid, 1, 1)]
        return runners[aligned], values

    def run(runner: Callable[..., None], values: list[Any]) -> None:
        if current_device() == index:
            runner(*values)
            return
        with module.device(index):
            runner(*values)

    def launch(args: Args) -> None:
        run(*prepared(args))

    def freeze(args: Args) -> Callable[[], None]:
        return functools.partial(run, *prepared(args))

    launch.freeze = freeze  # type: ignore[attr-defined]
    return launch


def _value(call: Call, name: str) -> Any:
    """What the kernel gets for a parameter that is no tensor."""
    return call.constants.get(name, call.numbers.get(name))


def _bind_interpreted(key: Key, args: Args, options: Options) -> Launch:
    """Run the kernel in Triton's interpreter, on tensors in the host's memory."""
    sizes = interpreted_plan(key, args[0].shape[0])
    call = describe(key, args, options, sizes, False, False)
    fixed = {name: _value(call, name) for name in heads_kernel.arg_names}

    def launch(args: Args) -> None:
        tensors = {name: _pointer(args[i]) for name, i in call.sources.items()}
        heads_kernel[(call.grid, 1, 1)](**{**fixed, **tensors})

    return launch


def _pointer(tensor: Tensor) -> Tensor:
    """One element at the tensor's address: the interpreter copies whole storages of what it gets,
    which must not be done to a pool."""
    dtype = tensor.dtype if tensor.dtype in _POINTERS else torch.uint8
    if tensor.numel() == 0:
        return torch.empty(1, dtype=dtype)
    memory = (ctypes.c_char * tensor.element_size()).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=dtype)
