"""The ways in which a kernel's work can be laid over threads, and which of them a call allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from ropool.backends.cuda.specialise import LONG_VECTOR_BYTES, SIZES, VECTOR_BYTES, Call
from ropool.dispatch import tuning

BULK_BYTES = 48 << 10
"""Shared memory that a block has without asking for more."""
WARP = 32
MOST_THREADS = 1024
EMPTY: Mapping[str, str] = MappingProxyType({})
LOADS = ("plain", "drop_first", "line", "cached")
"""How rows are read: past L1, with which L2 does nothing special, drops them before others, or
fetches their whole lines of 128 bytes; or through L1, which suits calls bound by bandwidth."""
VECTORS = (4, 8, VECTOR_BYTES, LONG_VECTOR_BYTES)


class Shape(NamedTuple):
    """`*_rows`: rows of a token that one thread takes. `dependent`: launched so that it may start
    while the kernel before it drains; `early`: it then prefetches while it waits. `joint`: a thread
    takes queries and keys alike. `bulk`: the bulk copy engine moves the rows, one a thread.
    `ahead`: rows are loaded before the token's position and slot are looked at, which suits calls
    bound by latency; without it fewer registers and loads are in flight, which can suit those bound
    by bandwidth."""

    q_rows: int = 2
    k_rows: int = 1
    v_rows: int = 1
    threads: int = 128
    dependent: bool = False
    early: bool = False
    joint: bool = False
    bulk: bool = False
    ahead: bool = True
    loads: str = "plain"
    lanes: int = WARP
    """Threads that take one MLA row stored as it came."""
    vector_bytes: int = LONG_VECTOR_BYTES
    """The most that a thread loads of a row at once. Shorter vectors spread a call of few tokens
    over more threads, each of which has less to wait for."""


def checked(choice: tuning.Choice) -> Shape:
    """The shape that a table's choice names. Raises `ValueError` for one that no kernel has."""
    try:
        shape = Shape(**choice)
    except TypeError as error:
        raise ValueError(f"ropool: tuning choice {dict(choice)}: {error}") from None
    counts = {"q_rows": 8, "k_rows": 8, "v_rows": 8, "lanes": 64, "threads": MOST_THREADS}
    for name, most in counts.items():
        value = getattr(shape, name)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"ropool: tuning choice: {name} is {value!r}; allowed: 1 to {most}")
    if type(shape.vector_bytes) is not int or shape.vector_bytes not in VECTORS:
        allowed = ", ".join(map(str, VECTORS))
        raise ValueError(
            f"ropool: tuning choice: vector_bytes is {shape.vector_bytes!r}; allowed: {allowed}"
        )
    for name in ("dependent", "early", "joint", "bulk", "ahead"):
        value = getattr(shape, name)
        if type(value) is not bool:
            raise ValueError(f"ropool: tuning choice: {name} is {value!r}; allowed: true, false")
    if shape.loads not in LOADS:
        raise ValueError(
            f"ropool: tuning choice: loads is {shape.loads!r}; allowed: {', '.join(LOADS)}"
        )
    fits = shape.threads <= WARP if shape.bulk else shape.threads % WARP == 0
    if not fits:
        allowed = "1 to 32 where bulk, else multiples of 32"
        raise ValueError(f"ropool: tuning choice: threads is {shape.threads}; allowed: {allowed}")
    return shape


def possible(shape: Shape, call: Call) -> Shape:
    """`shape` without what `call` does not allow: entries are shared by calls whose strides and
    addresses differ."""
    if shape.bulk and (not shape.dependent or why_not_bulk(call, shape.threads) is not None):
        shape = shape._replace(bulk=False, threads=128)
    if shape.joint and why_not_joint(call) is not None:
        shape = shape._replace(joint=False)
    return shape._replace(early=shape.early and shape.dependent)


def narrowed(call: Call, shape: Shape) -> Call:
    """`call` with rows cut into vectors no longer than those of `shape`."""
    most = shape.vector_bytes // SIZES[call.formats["Model"]]
    given = call.integers
    widths = {name: min(given[name], most) for name in ("VQ", "VK", "VV") if name in given}
    return replace(call, integers=given | widths)


def why_not_joint(call: Call) -> str | None:
    """Why a thread cannot take queries and keys of a call alike, or `None`."""
    given, key = call.integers, call.key
    if not given.get("HQ") or not given.get("HK"):
        return "there are not both"
    if given["VQ"] != given["VK"]:
        return "their vectors differ in width"
    if key.rotary_dim != key.head_dim:
        return "not all of a head is turned"
    return None


def row_bytes(call: Call) -> int:
    """Bytes of a token's keys and values."""
    given = call.integers
    elements = given["HK"] * call.key.head_dim + given["HV"] * given["DV"]
    return elements * SIZES[call.formats["Model"]]


def why_not_bulk(call: Call, rows: int = 1, names: Mapping[str, str] = EMPTY) -> str | None:
    """Why the bulk copy engine cannot move a call's rows, so many a block, or `None`. `names` has
    other names for the parts `k` and `v` of a row."""
    given, scalars, formats = call.integers, call.scalars, call.formats
    if not given.get("STORE") or call.key.rotary_dim or given.get("TILES"):
        return "the rows are not stored as they came"
    if not formats["Model"] == formats["KPool"] == formats["VPool"]:
        return "the pool's format is another"
    size = SIZES[formats["Model"]]
    parts = {"v": (given["HV"], given["DV"]), "k": (given["HK"], call.key.head_dim)}
    for part, (heads, dims) in parts.items():
        prefix, name = part.upper(), names.get(part, part)
        if given[f"{prefix}_GROUP"] or given[f"{prefix}_ROW_GROUP"] > 1:
            return f"the pool does not keep a row of {name} in one piece"
        dense = (scalars[f"{part}_head"], scalars[f"{part}_plane"] // size) == (dims, dims)
        if heads > 1 and not dense:
            return f"the heads of a row of {name} are apart"
        if heads * dims * size % VECTOR_BYTES:
            return f"a row of {name} is no multiple of {VECTOR_BYTES} bytes"
    for part in parts:
        name = names.get(part, part)
        if call.row_align[part] < VECTOR_BYTES:
            return f"not every row of {name} is aligned to {VECTOR_BYTES} bytes"
        if given[f"{part.upper()}_POOL_ALIGN"] < VECTOR_BYTES:
            return f"not every row of {name} in the pool is aligned to {VECTOR_BYTES} bytes"
    if rows * row_bytes(call) > BULK_BYTES - 1024:
        return "rows are too long for shared memory"
    return None
