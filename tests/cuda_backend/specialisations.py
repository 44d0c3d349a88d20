"""Calls that stand for the specialisations of the kernel."""

from __future__ import annotations

import functools
import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch

import ropool
from ops.calls import Case, arguments
from ops.grids import (
    rope_cases,
    rope_store_kv_cases,
    rope_store_mla_cases,
    store_kv_cases,
    store_mla_cases,
)
from ropool.backends.cuda.choose import shape_of
from ropool.backends.cuda.grid import grid_of
from ropool.backends.cuda.launch import describe, source_of
from ropool.backends.cuda.shape import narrowed
from ropool.backends.cuda.specialise import LONG_VECTOR_BYTES, VECTOR_BYTES
from ropool.dispatch.key import Key, Options
from ropool.ops._call import described

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a", "sm_120a"]
PROCESSORS = 132
DEVICE = "NVIDIA H200"
"""A device with a tuning table, so that every kind of layout is compiled."""
HEADS = ["32x8x128", "64x8x128", "8x1x128", "64x8x64", "40x8x128", "16x16x128", "9x3x64"]
ALIGNMENTS = (16, 4, 1)
"""Of the addresses of the grid's calls, in bytes."""
Bound = tuple[Key, tuple[Any, ...], Options]


def bound(op: str, arguments: dict[str, Any]) -> Bound:
    """What the backend is bound with by a call of `op` with keyword `arguments`."""
    names = inspect.signature(getattr(ropool, op)).parameters
    call = described("test", op, (), {n: v for n, v in arguments.items() if n in names})
    key, options = call.key()
    return key, call.tensors, options


def source(call: Bound, arch: str, align: int | None = None) -> str:
    """The kernel's text when every address is a multiple of `align`, or of the longest vector."""
    wide = arch not in ("sm_80", "sm_90a") and call[0].op == "store_mla_"
    longest = LONG_VECTOR_BYTES if wide else VECTOR_BYTES
    described = describe(*call, lambda name: align or longest)
    shape = shape_of(described, arch, PROCESSORS, DEVICE)
    described = narrowed(described, shape)
    return source_of(described, shape, grid_of(described, shape))


def grid_cases() -> list[Case]:
    """Every case of the op tests' grids."""
    return [
        *(*rope_cases(), *rope_store_kv_cases(), *store_kv_cases()),
        *(*store_mla_cases(), *rope_store_mla_cases()),
    ]


@functools.cache
def grid_calls() -> dict[str, Bound]:
    """Those cases as the backend sees them."""
    return {str(case): bound(case.op, arguments(case)) for case in grid_cases()}


@dataclass(frozen=True)
class Specialisation:
    """What a call asks for at addresses that are multiples of `align`, or of the longest vector.
    `texts` is a digest of its text for each architecture."""

    name: str
    case: str
    align: int | None
    texts: str

    def text(self, arch: str) -> str:
        """The kernel's text for `arch`."""
        return source((model_calls() | grid_calls())[self.case], arch, self.align)


@functools.cache
def specialisations() -> list[Specialisation]:
    """Those of models and of the grid, each once, under the name of the first call."""
    wanted = [(case, case, None, call) for case, call in model_calls().items()]
    for align in ALIGNMENTS:
        wanted += [(f"{case} at {align}", case, align, call) for case, call in grid_calls().items()]
    found: dict[str, Specialisation] = {}
    for name, case, align, call in wanted:
        texts = "\0".join(source(call, arch, align) for arch in ARCHITECTURES)
        digest = hashlib.sha256(texts.encode()).hexdigest()[:16]
        found.setdefault(digest, Specialisation(name, case, align, digest))
    return list(found.values())


@functools.cache
def model_calls() -> dict[str, Bound]:
    """The calls that models make, with few tokens and with many."""
    calls = {}
    for tokens in (16, 8192):
        for heads in HEADS:
            for what in ("bf16", "norm", "fp8"):
                name = f"rope_store_kv_-{heads}-{what}-{tokens}"
                calls[name] = bound("rope_store_kv_", _kv(heads, tokens, what))
        for heads in HEADS:
            calls[f"store_kv_-{heads}-{tokens}"] = bound("store_kv_", _kv(heads, tokens, "bf16"))
        for op, pool in (
            ("store_mla_", "bfloat16"),
            ("rope_store_mla_", "bfloat16"),
            ("rope_store_mla_", "float8_e4m3fn"),
            ("rope_store_mla_", "uint8"),
        ):
            calls[f"{op}-128x512x64-{pool}-{tokens}"] = bound(op, _mla(tokens, pool))
    return calls


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _kv(heads: str, tokens: int, what: str) -> dict[str, Any]:
    hq, hk, dim = map(int, heads.split("x"))
    parts = _empty(tokens, (hq + 2 * hk) * dim).split((hq * dim, hk * dim, hk * dim), dim=1)
    q, k, v = (part.unflatten(1, (-1, dim)) for part in parts)
    pool = torch.float8_e4m3fn if what == "fp8" else torch.bfloat16
    call = {
        "q": q,
        "k": k,
        "v": v,
        "layout": "slots",
        **{f"{part}_pool": _empty(64, hk, dim, dtype=pool) for part in "kv"},
        "cos_sin_cache": _empty(4096, dim, dtype=torch.float32),
        **{name: _empty(tokens, dtype=torch.int64) for name in ("positions", "slot_mapping")},
    }
    if what == "norm":
        call |= {f"{part}_norm_weight": _empty(dim) for part in "qk"}
    if what == "fp8":
        call |= {f"{part}_scale": _empty(1, dtype=torch.float32) for part in "kv"}
        call["q_out"] = _empty(tokens, hq, dim, dtype=pool)
    return call


def _mla(tokens: int, pool: str) -> dict[str, Any]:
    return {
        "q_rope": _empty(tokens, 128, 64),
        "k_nope": _empty(tokens, 512),
        "k_rope": _empty(tokens, 64),
        "pool": _empty(64, 656 if pool == "uint8" else 576, dtype=getattr(torch, pool)),
        "cos_sin_cache": _empty(4096, 64, dtype=torch.float32),
        **{name: _empty(tokens, dtype=torch.int64) for name in ("positions", "slot_mapping")},
    }
