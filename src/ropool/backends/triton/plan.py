"""How a call is cut into programs: tokens and heads a program, warps."""

from __future__ import annotations

from typing import NamedTuple

from ropool.dispatch.key import Key

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_VECTOR_BYTES = 16
_SIZES = ((4, 4), (1, 4), (1, 1))
"""`(warps, vectors a thread)` of a program, the preferred first. Four vectors a thread and tensor
hide the latency of memory and keep a rotated tile within 64 registers."""
_ENOUGH_PROGRAMS = 512
"""A size is taken when it leaves so many programs; below, more and smaller ones are faster."""


class Plan(NamedTuple):
    """Tokens and heads of a program that rotates queries and of one that serves keys or values,
    and the warps of each. All powers of two; `kv_tokens` is a multiple of `q_tokens`."""

    q_tokens: int
    q_heads: int
    kv_tokens: int
    kv_heads: int
    warps: int


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def _block(tokens: int, heads: int, vectors: int, budget: int) -> tuple[int, int]:
    """Tokens and heads of a program: heads of one token first, then, where they do not fill it,
    further tokens."""
    heads_here = min(next_power_of_2(heads), max(1, budget // vectors))
    tokens_here = min(next_power_of_2(tokens), max(1, budget // (vectors * heads_here)))
    return tokens_here, heads_here


def plan(key: Key, tokens: int, lanes: int) -> Plan:
    """A plan for `tokens` tokens on a GPU with `lanes` threads a warp."""
    item = _ITEM_BYTES[key.dtype]
    heads_kv = key.heads_kv or 1
    value_dim = key.latent_dim or key.v_head_dim
    q_vectors = max(1, next_power_of_2(key.head_dim) * item // _VECTOR_BYTES)
    kv_vectors = max(q_vectors, next_power_of_2(value_dim) * item // _VECTOR_BYTES)
    total = tokens * (key.heads_q * q_vectors + heads_kv * (q_vectors + kv_vectors))
    for warps, vectors in _SIZES:
        budget = warps * lanes * vectors
        if total >= budget * _ENOUGH_PROGRAMS:
            break
    kv_tokens, kv_heads = _block(tokens, heads_kv, kv_vectors, budget)
    q_tokens, q_heads = _block(tokens, key.heads_q or 1, q_vectors, budget)
    return Plan(min(q_tokens, kv_tokens), q_heads, kv_tokens, kv_heads, warps)


def interpreted_plan(key: Key, tokens: int) -> Plan:
    """A plan for the interpreter, where a program costs much and its size little: few programs,
    yet with more than one block of each kind, and one that is not full."""
    block = min(4, next_power_of_2(tokens))
    heads_kv = min(4, next_power_of_2(key.heads_kv or 1))
    return Plan(block, min(16, next_power_of_2(key.heads_q)), 2 * block, heads_kv, 1)
