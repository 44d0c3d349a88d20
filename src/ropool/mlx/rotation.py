"""What a rotation module of `mlx` or `mlx-lm` does, in the terms of the kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

MOST_TABLE_ROWS = 32768
"""Positions up to which the CPU reads cos/sin from a table; beyond it computes them."""

MOST_POSITIONS = 2**24
"""Positions that the kernels of a GPU compute angles of without a loss."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation module, and the same rotation as frequencies.

    `arguments` are keyword arguments of `ropool_metal.rope_pool_fused`; `None` when no table of
    frequencies says what the module does, and `reason` then says why.
    """

    module: Any
    dims: int
    interleaved: bool
    arguments: dict[str, Any] | None
    reason: str = ""

    def apply(self, x: mx.array, positions: mx.array) -> mx.array:
        """Rotate `x` `[T, H, D]` by the module itself, each token at its own position."""
        return self.module(x[:, :, None], offset=positions)[:, :, 0]


def read_rotation(module: Any, context: int, *, table: bool) -> Rotation:
    """The rotation of a module for positions below `context`; with `table` the kernels read cos/sin
    from one, otherwise they compute them."""
    dims = int(getattr(module, "dims", 0) or getattr(module, "dim", 0))
    interleaved = bool(getattr(module, "traditional", False))
    if isinstance(module, DynamicNTKScalingRoPE) and context <= module.max_position_embeddings:
        # The base grows with sequences that are longer than this, and there are none.
        module = nn.RoPE(dims, traditional=interleaved, base=module.base)
    if not table and context > MOST_POSITIONS:
        reason = f"the model's context is {context}, of which angles are exact below 2**24"
        return Rotation(module, dims, interleaved, None, reason)
    frequencies, factor, reason = _frequencies(module, dims)
    if frequencies is None:
        return Rotation(module, dims, interleaved, None, reason)
    arguments: dict[str, Any] = {"interleaved": interleaved}
    if table and context <= MOST_TABLE_ROWS:
        arguments["cos_sin"] = _table(frequencies.tobytes(), factor, context)
    else:
        high = frequencies.astype(np.float32)
        rest = (frequencies - high).astype(np.float32)
        arguments |= {"inv_freq": mx.array(np.stack([high, rest])), "factor": factor}
    return Rotation(module, dims, interleaved, arguments)


def _frequencies(module: Any, dims: int) -> tuple[Any, float, str]:
    """Angles a position, float64 `[R/2]`, and the factor of cos and sin; or why there are none."""
    exponents = np.arange(0, dims, 2, dtype=np.float64) / dims
    if isinstance(module, nn.RoPE):
        return module.scale * float(module.base) ** -exponents, 1.0, ""
    periods = getattr(module, "_freqs", None)
    if periods is None:
        name = type(module).__name__
        return None, 1.0, f"{name} has no fixed frequencies"
    # The half that only some of these modules rotate by has an infinite period.
    frequencies = 1.0 / np.array(periods.astype(mx.float32), dtype=np.float64)
    factor = getattr(module, "mscale", None) or getattr(module, "_scale", None) or 1.0
    return frequencies, float(factor), ""


@functools.lru_cache(maxsize=8)
def _table(frequencies: bytes, factor: float, rows: int) -> mx.array:
    """`[rows, R]`, cosines first. Layers that rotate alike share it."""
    angles = np.outer(np.arange(rows), np.frombuffer(frequencies, np.float64))
    table = np.concatenate([np.cos(angles), np.sin(angles)], 1) * factor
    return mx.array(table.astype(np.float32))
