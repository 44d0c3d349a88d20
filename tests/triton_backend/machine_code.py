"""Compiles the kernels for GPUs that are not there and reads what came out.

`python -m triton_backend.machine_code` writes `machine_code.csv`, which tests compare with.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ropool.dispatch.key import Key, Options
from ropool.layouts import KVLayout
from ropool.ops import rope, rope_store_kv, rope_store_mla, store_kv, store_mla

TABLE = Path(__file__).with_suffix(".csv")
VERSION = "3.7.1"
"""The Triton whose compilers made the table."""

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
    "gfx1201": ("hip", "gfx1201", 32),
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
}

PROCESSORS = 128


@dataclass(frozen=True)
class Code:
    """What one kernel became. Registers are those of a thread; a load or store is wide when it
    moves 16 bytes a thread."""

    case: str
    target: str
    registers: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    narrow_stores: int
    spilled: int


def missing() -> str | None:
    """Why there is nothing to compile with, or None."""
    found = importlib.util.find_spec("triton")
    return "triton is not installed" if found is None or found.origin is None else None


Call = tuple[Key, tuple[Any, ...], Options]


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _indices(tokens: int) -> torch.Tensor:
    return _empty(tokens, dtype=torch.int64)


def _kv(
    heads_q: int,
    heads_kv: int,
    dim: int,
    *,
    tokens: int = 8192,
    fp8: str | None = None,
    norm: bool = False,
    **options: Any,
) -> Call:
    table = _empty(8192, dim, dtype=torch.float32)
    pool = _empty(999, 16, heads_kv, dim, dtype=getattr(torch, fp8 or "bfloat16"))
    scale = _empty(heads_kv, dtype=torch.float32) if fp8 else None
    weight = _empty(dim) if norm else None
    heads = [_empty(tokens, count, dim) for count in (heads_q, heads_kv, heads_kv)]
    indices = (_indices(tokens), _indices(tokens), None)
    args = (*heads, pool, pool, table, *indices, weight, weight, scale, scale, None, None, None)
    named = Options(layout=KVLayout.NHD, **options)
    return rope_store_kv._key(args, named), args, named


def _rope(heads_q: int, head_dim: int, rotary_dim: int) -> Call:
    args = (
        _empty(8192, heads_q, head_dim),
        _empty(8192, 8, head_dim),
        _empty(8192, rotary_dim, dtype=torch.float32),
        _indices(8192),
        None,
    )
    return rope._key(args, Options()), args, Options()


def _store(dim: int) -> Call:
    rows, pool = _empty(8192, 8, dim), _empty(999, 16, 8, dim)
    args = (rows, rows, pool, pool, _indices(8192), None, None, None)
    named = Options(layout=KVLayout.NHD)
    return store_kv._key(args, named), args, named


def _store_mla() -> Call:
    args = (_empty(65536, 512), _empty(65536, 64), _empty(99999, 576), _indices(65536), None, None)
    return store_mla._key(args, Options()), args, Options()


def _rope_store_mla() -> Call:
    tokens, options = 8192, Options(interleaved=True)
    pool = _empty(99999, 656, dtype=torch.uint8)
    heads = (_empty(tokens, 128, 64), _empty(tokens, 512), _empty(tokens, 64))
    table = _empty(8192, 64, dtype=torch.float32)
    args = (*heads, pool, table, _indices(tokens), _indices(tokens), *[None] * 5)
    return rope_store_mla._key(args, options), args, options


CASES: dict[str, Callable[[], Call]] = {
    "rope_ 32x8x128 rotary 64": lambda: _rope(32, 128, 64),
    "rope_ 32x8x128": lambda: _rope(32, 128, 128),
    "rope_ 64x8x64": lambda: _rope(64, 64, 64),
    "store_kv_ 8x128": lambda: _store(128),
    "store_kv_ 8x64": lambda: _store(64),
    "rope_store_kv_ 32x8x128": lambda: _kv(32, 8, 128),
    "rope_store_kv_ 32x8x128 few tokens": lambda: _kv(32, 8, 128, tokens=32),
    "rope_store_kv_ 64x8x64": lambda: _kv(64, 8, 64),
    "rope_store_kv_ 32x8x128 fp8": lambda: _kv(32, 8, 128, fp8="float8_e4m3fn"),
    "rope_store_kv_ 32x8x128 fp8 FNUZ": lambda: _kv(32, 8, 128, fp8="float8_e4m3fnuz"),
    "rope_store_kv_ 32x8x128 norm interleaved": lambda: _kv(
        32, 8, 128, norm=True, interleaved=True
    ),
    "store_mla_ 512+64": _store_mla,
    "rope_store_mla_ 128x64 656 bytes": _rope_store_mla,
    "rope_ 32x8x128 rotary 96": lambda: _rope(32, 128, 96),
    "rope_store_kv_ 32x8x80": lambda: _kv(32, 8, 80),
    "rope_store_kv_ 32x8x96": lambda: _kv(32, 8, 96),
    "rope_store_kv_ 32x8x112": lambda: _kv(32, 8, 112),
    "rope_store_kv_ 32x8x192": lambda: _kv(32, 8, 192),
    "rope_store_kv_ 32x8x256": lambda: _kv(32, 8, 256),
    "rope_store_kv_ 32x8x512": lambda: _kv(32, 8, 512),
}
WIDTHS = tuple(CASES)[-7:]
WIDTH_TARGETS = ("gfx942", "gfx1201", "sm_90")
"""Other head dims are compiled for one target of each kind."""


def cases_of(target: str) -> list[str]:
    """The names of the kernels that are compiled for a target."""
    return [case for case in CASES if case not in WIDTHS or target in WIDTH_TARGETS]


def compile_for(case: str, target: str) -> Code:
    """Compile one kernel for one target and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ropool.backends.triton import launch
    from ropool.backends.triton.call import describe
    from ropool.backends.triton.plan import plan

    key, args, options = CASES[case]()
    gpu = GPUTarget(*TARGETS[target])
    cut = plan(key, args[0].shape[0], gpu.warp_size, PROCESSORS)
    call = describe(key, args, options, cut, True, launch.native_fp8(gpu))
    source = launch.source(call, args, True)
    kernel = triton.compile(source, target=gpu, options={"num_warps": call.warps})
    return (_nvidia if gpu.backend == "cuda" else _amd)(case, target, kernel)


def _nvidia(case: str, target: str, kernel: Any) -> Code:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    loads = re.findall(r"ld\.global[\w.:]*", kernel.asm["ptx"])
    stores = re.findall(r"st\.global[\w.:]*", kernel.asm["ptx"])
    wide = [sum(".v4.b32" in name for name in names) for names in (loads, stores)]
    return Code(
        case, target, int(read["REG"]), int(read["SHARED"]),
        wide[0], wide[1], len(stores) - wide[1], int(read["STACK"]) + int(read["LOCAL"]),
    )  # fmt: skip


def _amd(case: str, target: str, kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found.group(1))

    loads = re.findall(r"\b(?:global|buffer)_load_\w+", text)
    stores = re.findall(r"\b(?:global|buffer)_store_\w+", text)
    wide = [sum(name.endswith(("x4", "b128")) for name in names) for names in (loads, stores)]
    spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    spilled += number("private_segment_fixed_size")
    return Code(
        case, target, number("vgpr_count"), number("group_segment_fixed_size"),
        wide[0], wide[1], len(stores) - wide[1], spilled,
    )  # fmt: skip


def recorded() -> dict[tuple[str, str], Code]:
    """The table."""
    with TABLE.open(newline="") as file:
        rows = [
            Code(row["case"], row["target"], *(int(row[f.name]) for f in fields(Code)[2:]))
            for row in csv.DictReader(file)
        ]
    return {(row.case, row.target): row for row in rows}


def main() -> None:
    """Write the table."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Code)], lineterminator="\n")
        writer.writeheader()
        for case in CASES:
            for target in (target for target in TARGETS if case in cases_of(target)):
                writer.writerow(asdict(compile_for(case, target)))


if __name__ == "__main__":
    main()
