"""A rotation in float64, by its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

_ROUNDING = {mx.float32: 2.0**-23, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def bits(array: Any) -> Any:
    """The exact values as float32."""
    return np.array(array.astype(mx.float32))


def rotated(
    x: Any,
    positions: Any,
    frequencies: Any,
    *,
    known: Sequence[bool],
    interleaved: bool = False,
    factor: float = 1.0,
) -> Any:
    """`x` `[T, H, D]` rotated in float64; tokens that are not `known` as they are."""
    exact = bits(x).astype(np.float64)
    pairs = len(frequencies)
    angles = np.outer(np.asarray(positions, np.float64), frequencies.astype(np.float64))[:, None]
    cosine, sine = np.cos(angles) * factor, np.sin(angles) * factor
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    a, b = exact[..., first].copy(), exact[..., second].copy()
    result = exact.copy()
    result[..., first] = a * cosine - b * sine
    result[..., second] = b * cosine + a * sine
    for at, ok in enumerate(known):
        if not ok:
            result[at] = exact[at]
    return result


def close(got: Any, exact: Any, before: Any) -> None:
    """One rounding to the storage type, and a few units of float32 of what is rounded."""
    if not exact.size:
        return
    scale = np.abs(bits(before)).max(-1, keepdims=True)
    allowed = _ROUNDING[got.dtype] * np.abs(exact) + 1e-6 * scale + 2.0**-24
    error = np.abs(bits(got) - exact)
    assert (error <= allowed).all(), error.max()
