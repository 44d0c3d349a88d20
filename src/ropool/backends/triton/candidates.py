"""The sizes of programs that `ropool tune` measures."""

from __future__ import annotations

import itertools

from ropool.dispatch.key import Key
from ropool.dispatch.tuning import Choice


def layouts(key: Key, tokens: int) -> list[Choice]:
    """What is tried for calls of `key` with so many tokens."""
    sizes = itertools.product((1, 2, 4, 8), (1, 2, 4, 8))
    return [{"warps": warps, "vectors": vectors} for warps, vectors in sizes]


def refinements(choice: Choice) -> list[Choice]:
    """None: two numbers say everything."""
    return []
