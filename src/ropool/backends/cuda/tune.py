"""How a kernel's work is laid over threads and blocks: few rows a thread while the GPU is not full,
then more, so that a thread has more loads in flight for each cos/sin row that it reads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import NamedTuple

from ropool.backends.cuda.specialise import Call

WARP = 32


class Shape(NamedTuple):
    """`*_rows`: rows of a token that one thread takes. `dependent`: launched so that it may start
    while the kernel before it drains."""

    q_rows: int
    k_rows: int
    v_rows: int
    threads: int
    dependent: bool
    early: bool


def shape_of(call: Call, arch: str) -> Shape:
    """The layout for a call on `arch` (such as `sm_90`)."""
    dependent = int(arch.removeprefix("sm_").rstrip("af")) >= 90
    forced = os.environ.get("ROPOOL_CUDA_SHAPE")
    if forced:
        q, k, v, threads, pdl, early = map(int, forced.split(","))
        return Shape(q, k, v, threads, bool(pdl), bool(early))
    return Shape(1, 1, 1, 256, dependent, dependent)


@dataclass
class Grid:
    """Blocks of a launch by kind of row, and the constants by which a block finds its work."""

    blocks: dict[str, int] = field(default_factory=lambda: {"k": 0, "v": 0, "q": 0})
    constants: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.blocks.values())


def grid_of(call: Call, shape: Shape) -> Grid:
    """Deal the work of a call out to blocks."""
    key, given = call.key, call.integers
    grid = Grid()

    def add(kind: str, heads: int, rows: int, units: int, together: bool) -> None:
        # Rows that are reduced over their threads need a team of lanes within one warp.
        team = min(WARP, 1 << (units - 1).bit_length()) if together else units
        lanes = math.ceil(heads / rows)
        prefix = kind.upper()
        grid.constants |= {f"U{prefix}": rows, f"{prefix}_UNITS": units}
        grid.constants |= {f"{prefix}_TEAM": team, f"{prefix}_LANES": lanes}
        tokens = shape.threads // (team * lanes)
        if tokens:
            grid.blocks[kind] = math.ceil(call.tokens / tokens)
        else:
            grid.blocks[kind] = call.tokens * math.ceil(team * lanes / shape.threads)

    half = key.rotary_dim // 2
    stores, normed = given.get("STORE", 0), given.get("K_NORM", 0)
    if given.get("HK"):
        units = _units(key.head_dim, half, given["VK"], bool(stores or normed))
        add("k", given["HK"], min(shape.k_rows, given["HK"]), units, bool(normed))
    if given.get("HV") and not given["MERGED"]:
        units = _units(given["DV"], 0, given["VV"], True)
        add("v", given["HV"], min(shape.v_rows, given["HV"]), units, bool(given.get("TILES")))
    if given.get("HQ"):
        normed = given.get("Q_NORM", 0)
        units = _units(key.head_dim, half, given["VQ"], bool(normed or given.get("Q_OUT")))
        add("q", given["HQ"], min(shape.q_rows, given["HQ"]), units, bool(normed))
    return grid


def _units(dims: int, half: int, width: int, whole: bool) -> int:
    """Units of two vectors in a row: of its turned part, or of all of it."""
    passed = (dims - 2 * half) // width
    return half // width + (math.ceil(passed / 2) if whole else 0)
