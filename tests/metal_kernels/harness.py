"""Calls the kernels of the `.metal` file, compiled as C++, one thread after the other."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metal_kernels.compiler import build

KERNELS = ("rope_q", "rope_k_pool", "v_to_pool", "kv_to_pool", "rope_pool_fused")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Shape(ctypes.Structure):
    """`ropool::metal::Shape`."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("heads_q", ctypes.c_int32),
        ("heads_kv", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("interleaved", ctypes.c_bool),
    )


class _Case(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            *("kernel", "dtype", "width", "per_thread"),
            *("source", "long_positions", "long_slots", "sloppy", "first_token"),
        )
    )


BUFFERS = ("q", "k", "v", "positions", "slots", "source", "q_out", "k_out", "k_pool", "v_pool")


class _Buffers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in BUFFERS)


class _Params(ctypes.Structure):
    _fields_ = (
        *((f"{n}_{part}", ctypes.c_int64) for n in "qkv" for part in ("token", "head", "dim")),
        *((name, ctypes.c_int64) for name in ("position", "slot", "slots", "table_rows")),
        ("factor", ctypes.c_float),
        ("padding", ctypes.c_int32),
    )


def load() -> ctypes.CDLL:
    """The compiled kernels, with the types of what their functions return."""
    library = build()
    library.unwatch.restype = ctypes.c_long
    library.alignment.restype = ctypes.c_int64
    return library


@dataclass
class Call:
    """One kernel call: tensors by the names of `BUFFERS`, those that a kernel does not use too."""

    kernel: str
    shape: Shape
    tensors: dict[str, Tensor]
    slots: int
    source: int
    factor: float = 1.0
    width: int | None = None
    per_thread: int = 0
    sloppy: int = 0
    first_token: int = 0
    """The threads of the tokens before it do not run."""
    counts: dict[str, Tensor] = field(default_factory=dict)


def width_of(lib: ctypes.CDLL, call: Call) -> int:
    """The vector width that the host code chooses for the tensors as they stand."""
    least = 4
    for name in ("q", "k", "v"):
        x = call.tensors[name]
        args = (ctypes.c_uint64(x.data_ptr()), ctypes.c_int64(x.element_size()))
        strides = [ctypes.c_int64(stride) for stride in x.stride()[:2]]
        found = int(lib.alignment(*args, *strides)) if x.stride(2) == 1 else 1
        least = min(least, found)
    for name in ("k_pool", "v_pool"):
        x = call.tensors[name]
        args = (ctypes.c_uint64(x.data_ptr()), ctypes.c_int64(x.element_size()))
        width = int(lib.alignment(*args, ctypes.c_int64(x.shape[-1]), ctypes.c_int64(0)))
        least = min(least, width)
    return int(lib.vector_width(ctypes.byref(call.shape), ctypes.c_int64(least)))


def run(lib: ctypes.CDLL, call: Call, *, count: bool = True) -> int:
    """Run a call in place; `call.counts` then says how often each byte of an output was stored.
    Return the number of stores outside of all outputs."""
    t = call.tensors
    for name in ("q_out", "k_out", "k_pool", "v_pool"):
        size = t[name].numel() * t[name].element_size()
        counts = torch.zeros(size if count else 0, dtype=torch.uint8)
        call.counts[name] = counts
        lib.watch(
            ctypes.c_void_p(t[name].data_ptr()),
            ctypes.c_int64(size),
            ctypes.c_void_p(counts.data_ptr() if count else 0),
        )
    width = width_of(lib, call) if call.width is None else call.width
    case = _Case(
        *(KERNELS.index(call.kernel), DTYPES.index(t["q"].dtype), width, call.per_thread),
        *(call.source, t["positions"].dtype == torch.int64, t["slots"].dtype == torch.int64),
        *(call.sloppy, call.first_token),
    )
    strides = [stride for name in "qkv" for stride in t[name].stride()]
    table_rows = t["source"].shape[0]
    params = _Params(
        *strides,
        *(t["positions"].stride(0), t["slots"].stride(0), call.slots, table_rows, call.factor, 0),
    )
    buffers = _Buffers(*(t[name].data_ptr() for name in BUFFERS))
    references: list[Any] = [ctypes.byref(x) for x in (case, call.shape, buffers, params)]
    lib.run_kernel(*references)
    stray: int = lib.unwatch()
    return stray
