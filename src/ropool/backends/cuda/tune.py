"""How a kernel's work is laid over threads and blocks.

A call whose threads the GPU holds all at once is bound by latency: its blocks are small, and it
prefetches before the previous kernel has ended. A larger one is bound by bandwidth.
The numbers here were measured on an H200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from ropool.backends.cuda.specialise import SIZES, VECTOR_BYTES, Call

WARP = 32
EARLY_SHAPES = (((2, 1, 1), 1024), ((4, 2, 1), 768))
"""Rows a thread of a kernel that rotates, and so many of its threads a multiprocessor holds."""
EARLY_COPIES = 1536
"""Threads of a kernel that copies that a multiprocessor holds."""
SHORT_ROW_BYTES = 128
BULK_ROWS = 4
BULK_TOKENS = 48
"""Tokens a multiprocessor from which on the bulk copy engine is the faster."""
BULK_EARLY_BYTES = 12 << 20
BULK_BYTES = 48 << 10
"""Shared memory of a block."""
LARGEST_GROUP = 64
GROUP_WASTE = 1.05
"""A group of tokens is as small as can be with no more than this times the fewest blocks."""


class Shape(NamedTuple):
    """`*_rows`: rows of a token that one thread takes. `dependent`: launched so that it may start
    while the kernel before it drains; `early`: it then prefetches while it waits. `bulk`: the bulk
    copy engine moves the rows, one a thread."""

    q_rows: int
    k_rows: int
    v_rows: int
    threads: int
    dependent: bool
    early: bool
    bulk: bool = False


def shape_of(call: Call, arch: str, processors: int) -> Shape:
    """The layout for a call on `arch` (such as `sm_90`) with so many multiprocessors."""
    dependent = int(arch.removeprefix("sm_").rstrip("af")) >= 90
    if not call.key.rotary_dim:
        return _copy_shape(call, dependent, processors)
    if dependent:
        for rows, held in EARLY_SHAPES:
            early = Shape(*rows, 64, True, True)
            if call.tokens * threads_per_token(call, early) <= processors * held:
                return early
    row = call.key.head_dim * SIZES[call.formats["Model"]]
    return Shape(2 if row > SHORT_ROW_BYTES else 1, 1, 1, 128, dependent, False)


def _copy_shape(call: Call, dependent: bool, processors: int) -> Shape:
    """For the ops that do not rotate."""
    if dependent and call.tokens >= BULK_TOKENS * processors and why_not_bulk(call) is None:
        early = call.tokens * _row_bytes(call) <= BULK_EARLY_BYTES
        return Shape(1, 1, 1, BULK_ROWS, True, early, True)
    shape = Shape(1, 1, 1, 64 if call.tokens <= processors else 128, dependent, dependent)
    fits = call.tokens * threads_per_token(call, shape) <= processors * EARLY_COPIES
    return shape._replace(early=dependent and fits)


def _row_bytes(call: Call) -> int:
    """Bytes of a token's keys and values."""
    given = call.integers
    elements = given["HK"] * call.key.head_dim + given["HV"] * given["DV"]
    return elements * SIZES[call.formats["Model"]]


def why_not_bulk(call: Call) -> str | None:
    """Why the bulk copy engine cannot move a call's rows, or `None`."""
    given, scalars, formats = call.integers, call.scalars, call.formats
    if not given.get("STORE") or call.key.rotary_dim or given.get("TILES"):
        return "the rows are not stored as they came"
    if not formats["Model"] == formats["KPool"] == formats["VPool"]:
        return "the pool's format is another"
    size = SIZES[formats["Model"]]
    parts = {"k": (given["HK"], call.key.head_dim), "v": (given["HV"], given["DV"])}
    for part, (heads, dims) in parts.items():
        prefix = part.upper()
        if given[f"{prefix}_GROUP"] or given[f"{prefix}_ROW_GROUP"] > 1:
            return f"{part}_pool does not keep a row in one piece"
        dense = (scalars[f"{part}_head"], scalars[f"{part}_plane"] // size) == (dims, dims)
        if heads > 1 and not dense:
            return f"the heads of a row of {part} are apart"
        if heads * dims * size % VECTOR_BYTES:
            return f"a row of {part} is no multiple of {VECTOR_BYTES} bytes"
        if given[f"{prefix}_POOL_ALIGN"] < VECTOR_BYTES or call.row_align[part] < VECTOR_BYTES:
            return f"{part} is not aligned to {VECTOR_BYTES} bytes"
    if BULK_ROWS * _row_bytes(call) > BULK_BYTES - 1024:
        return "rows are too long for shared memory"
    return None


@dataclass
class Grid:
    """Blocks of a launch, and the constants by which a block finds its work: each group of tokens
    has so many blocks for keys, for values and for queries."""

    blocks: int = 0
    constants: dict[str, int] = field(default_factory=dict)


def grid_of(call: Call, shape: Shape) -> Grid:
    """Deal the work of a call out to blocks."""
    if shape.bulk:
        return Grid(math.ceil(call.tokens / shape.threads), {})
    constants, per_token = _teams(call, shape)

    def blocks(group: int) -> dict[str, int]:
        return {kind: _blocks(group, count, shape.threads) for kind, count in per_token.items()}

    cost = {group: sum(blocks(group).values()) / group for group in range(1, LARGEST_GROUP + 1)}
    least = min(cost.values())
    group = next(group for group, blocks in cost.items() if blocks <= GROUP_WASTE * least)
    chosen = blocks(group)
    constants["GROUP"] = group
    constants |= {f"{kind}_BLOCKS": count for kind, count in chosen.items()}
    return Grid(math.ceil(call.tokens / group) * sum(chosen.values()), constants)


def threads_per_token(call: Call, shape: Shape) -> int:
    """Threads that work on one token."""
    return sum(_teams(call, shape)[1].values())


def _teams(call: Call, shape: Shape) -> tuple[dict[str, int], dict[str, int]]:
    """The constants by which a thread finds its rows, and the threads a token has by kind of
    row."""
    key, given = call.key, call.integers
    constants: dict[str, int] = {}
    per_token: dict[str, int] = {}

    def add(kind: str, heads: int, rows: int, units: int, together: bool) -> None:
        # Rows that are reduced over their threads need a team of lanes within one warp.
        team = min(WARP, 1 << (units - 1).bit_length()) if together else units
        rows = min(rows, heads)
        lanes = math.ceil(heads / rows)
        constants.update({f"U{kind}": rows, f"{kind}_UNITS": units})
        constants.update({f"{kind}_TEAM": team, f"{kind}_LANES": lanes})
        per_token[kind] = team * lanes

    half = key.rotary_dim // 2
    stores, normed = given.get("STORE", 0), given.get("K_NORM", 0)
    if given.get("JOINED"):
        vectors = (key.latent_dim + key.head_dim) // given["VV"]
        add("V", 1, 1, math.ceil(vectors / 2), False)
    elif given.get("HK"):
        units = _units(key.head_dim, half, given["VK"], bool(stores or normed))
        add("K", given["HK"], shape.k_rows, units, bool(normed))
    if given.get("HV") and not given["MERGED"] and not given.get("JOINED"):
        units = _units(given["DV"], 0, given["VV"], True)
        add("V", given["HV"], shape.v_rows, units, bool(given.get("TILES")))
    if given.get("HQ"):
        normed = given.get("Q_NORM", 0)
        units = _units(key.head_dim, half, given["VQ"], bool(normed or given.get("Q_OUT")))
        add("Q", given["HQ"], shape.q_rows, units, bool(normed))

    return constants, per_token


def _blocks(group: int, per_token: int, threads: int) -> int:
    """Blocks that serve one kind of rows of `group` tokens; a block serves whole tokens if it
    can."""
    tokens = threads // per_token
    return math.ceil(group / tokens) if tokens else group * math.ceil(per_token / threads)


def _units(dims: int, half: int, width: int, whole: bool) -> int:
    """Units of two vectors in a row: of its turned part, or of all of it."""
    passed = (dims - 2 * half) // width
    return half // width + (math.ceil(passed / 2) if whole else 0)
