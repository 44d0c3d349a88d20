"""How a call is cut into programs: tokens and heads a program, warps."""

from __future__ import annotations

from typing import NamedTuple

from ropool.dispatch.key import Key

_VECTOR_BYTES = 16
_VECTORS_A_THREAD = 4
"""Loads in flight a thread; four keep the registers of a rotated tile below a quarter of what the
smallest supported GPU has."""

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class Plan(NamedTuple):
    """Tokens and query or key/value heads of one program, and its warps."""

    tokens: int
    heads_q: int
    heads_kv: int
    warps: int


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def plan(key: Key, tokens: int, lanes: int) -> Plan:
    """A plan for `tokens` tokens on a GPU with `lanes` threads a warp.

    A program takes as many heads of one token as fill its threads with a few vectors each. Where a
    token has too few heads, as an MLA row has, and there are tokens enough to occupy the GPU all
    the same, a program takes several tokens.
    """
    width = next_power_of_2(max(key.head_dim, key.v_head_dim or key.latent_dim))
    head_vectors = max(1, width * _ITEM_BYTES[key.dtype] // _VECTOR_BYTES)
    warps = 1 if tokens < 1024 else 4
    budget = warps * lanes * _VECTORS_A_THREAD
    heads = max(1, budget // head_vectors)
    heads_q = min(heads, next_power_of_2(key.heads_q)) if key.heads_q else 1
    heads_kv = min(heads, next_power_of_2(key.heads_kv or 1))
    block = 1
    while block * 2 * heads_kv <= heads and block * 2 * 1024 <= tokens:
        block *= 2
    return Plan(block, max(1, min(heads_q, heads // block)), heads_kv, warps)
