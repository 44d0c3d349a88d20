"""How a call is cut into programs: tokens and heads a program, warps.

What was measured for a call on a device of its name goes first, see `ropool.dispatch.tuning`; a
choice has `warps` and `vectors`, 16-byte vectors that a thread loads at once. The kernel has no
loop, so there are no stages to choose. Without a measurement the size follows from the number of
processors.
"""

from __future__ import annotations

from typing import NamedTuple

from ropool.dispatch.key import Key
from ropool.dispatch.tuning import Choice, Table

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_VECTOR_BYTES = 16
_MANY = (2, 4)
"""`(warps, vectors a thread)` where programs are many: four vectors in flight a thread hide the
latency of memory and keep a rotated tile within 64 registers."""
_FEW = (4, 1)
"""Where they are few, a call lasts as long as one program does: a thread has one vector, and the
warps of a token stand together."""
_PROGRAMS = 8
"""Programs for each processor from which on they are many."""
WARPS = (1, 2, 4, 8, 16)
VECTORS = (1, 2, 4, 8, 16)


class Block(NamedTuple):
    """Tokens and heads of one program, powers of two."""

    tokens: int
    heads: int


class Plan(NamedTuple):
    """The blocks of the programs that rotate queries and serve keys and values, and their warps."""

    q: Block
    k: Block
    v: Block
    warps: int


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def _vectors(dims: int, key: Key) -> int:
    return max(1, next_power_of_2(dims) * _ITEM_BYTES[key.dtype] // _VECTOR_BYTES)


def _block(tokens: int, heads: int, vectors: int, budget: int) -> Block:
    """Heads of one token first, then, where they do not fill the budget, further tokens."""
    heads_here = min(next_power_of_2(heads), max(1, budget // vectors))
    tokens_here = max(1, budget // (vectors * heads_here))
    return Block(min(next_power_of_2(tokens), tokens_here), heads_here)


def plan(key: Key, tokens: int, lanes: int, processors: int, choice: Choice | None = None) -> Plan:
    """A plan for `tokens` tokens on a GPU with `lanes` threads a warp and so many processors;
    `choice`: what was measured for such calls. Raises `ValueError` for a choice that is none."""
    heads_kv = key.heads_kv or 1
    q_vectors, v_vectors = _head_vectors(key)
    if choice is None:
        choice = default_choice(key, tokens, lanes, processors)
    warps, vectors = _size(choice)
    budget = warps * lanes * vectors
    return Plan(
        _block(tokens, key.heads_q, q_vectors, budget),
        _block(tokens, heads_kv, q_vectors, budget),
        _block(tokens, heads_kv, v_vectors, budget),
        warps,
    )


def default_choice(key: Key, tokens: int, lanes: int, processors: int) -> Choice:
    """What a call gets that nothing was measured for."""
    q_vectors, v_vectors = _head_vectors(key)
    total = tokens * (key.heads_q * q_vectors + (key.heads_kv or 1) * (q_vectors + v_vectors))
    many = _MANY[0] * _MANY[1] * lanes * _PROGRAMS * processors
    warps, vectors = _MANY if total >= many else _FEW
    return {"warps": warps, "vectors": vectors}


def _head_vectors(key: Key) -> tuple[int, int]:
    """16-byte vectors of a query or key head, and of a value head or latent."""
    return _vectors(key.head_dim, key), _vectors(key.latent_dim or key.v_head_dim, key)


def check_tuning(table: Table) -> None:
    """Raise `ValueError` for a choice that is none."""
    for choices in table.entries.values():
        for choice in choices.values():
            _size(choice)


def _size(choice: Choice) -> tuple[int, int]:
    for name, allowed in (("warps", WARPS), ("vectors", VECTORS)):
        if type(choice.get(name)) is not int or choice[name] not in allowed:
            raise ValueError(
                f"ropool: a tuning table of the triton backend has {name} {choice.get(name)!r}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )
    return choice["warps"], choice["vectors"]


def interpreted_plan(key: Key, tokens: int) -> Plan:
    """A plan for the interpreter, where a program costs much and its size little: few programs,
    yet with more than one block of each kind, and one that is not full."""
    few = min(4, next_power_of_2(tokens))
    many = min(8, next_power_of_2(tokens))
    heads_kv = min(4, next_power_of_2(key.heads_kv))
    heads_q = min(16, next_power_of_2(key.heads_q))
    return Plan(Block(few, heads_q), Block(many, heads_kv), Block(few, heads_kv), 1)
