"""How a kernel's work is dealt out to blocks and threads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ropool.backends.cuda.shape import WARP, Shape
from ropool.backends.cuda.specialise import Call

LARGEST_GROUP = 64
GROUP_WASTE = 1.05
"""A group of tokens is as small as can be with no more than this times the fewest blocks."""


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
        add("V", 1, 1, min(vectors, shape.lanes), False)
    elif given.get("HK") and not shape.joint:
        units = _units(key.head_dim, half, given["VK"], bool(stores or normed))
        add("K", given["HK"], shape.k_rows, units, bool(normed))
    if given.get("HV") and not given["MERGED"] and not given.get("JOINED"):
        units = _units(given["DV"], 0, given["VV"], True)
        add("V", given["HV"], shape.v_rows, units, bool(given.get("TILES")))
    if given.get("HQ"):
        normed = given.get("Q_NORM", 0) or (shape.joint and normed)
        units = _units(key.head_dim, half, given["VQ"], bool(normed or given.get("Q_OUT")))
        add("Q", given["HQ"], shape.q_rows, units, bool(normed))
    if shape.joint:
        # The keys go with the queries: the same units, teams and lanes.
        constants.update(
            {f"K_{what}": constants[f"Q_{what}"] for what in ("UNITS", "TEAM", "LANES")}
        )
        constants["UK"] = math.ceil(given["HK"] / constants["Q_LANES"])
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
