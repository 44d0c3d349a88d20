"""Formats of storage, decoded and rounded by the oracle itself, and the one tolerance table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Format:
    """A binary format: `mantissa` stored bits, exponent of the smallest normal, largest value."""

    mantissa: int
    min_exponent: int
    largest: float
    saturates: bool
    negative_zero: bool = True

    def round(self, exact: Array) -> Array:
        """Nearest value of the format, ties to even, subnormals kept; NaN stays NaN."""
        if self.saturates:
            exact = np.clip(exact, -self.largest, self.largest)
        finite = np.where(np.isfinite(exact), exact, 0.0)
        exponent = np.maximum(np.frexp(finite)[1] - 1, self.min_exponent)
        step = np.ldexp(1.0, exponent - self.mantissa)
        rounded = np.rint(finite / step) * step
        rounded = np.where(np.abs(rounded) > self.largest, np.copysign(np.inf, rounded), rounded)
        return np.where(np.isfinite(exact), rounded, exact)


# A stored value is right when it lies between the roundings of (exact - slack) and (exact + slack):
# each dtype allows half a unit in its own last place, the one rounding at the store, and the slack
# below, what float32 arithmetic on the way there may lose. Nothing else.
FORMATS = {
    torch.float32: Format(23, -126, float(np.finfo(np.float32).max), False),  # 2**-24 + slack
    torch.float16: Format(
        10, -14, 65504.0, False
    ),  # 2**-11 relative; beyond 65504 (+ half a step) inf
    torch.bfloat16: Format(7, -126, (2 - 2**-7) * 2.0**127, False),  # 2**-8 relative
    torch.float8_e4m3fn: Format(3, -6, 448.0, True),  # 2**-4 relative: the neighbour only at a tie
    torch.float8_e5m2: Format(2, -14, 57344.0, True),  # 2**-3 relative: the neighbour only at a tie
    torch.float8_e4m3fnuz: Format(3, -7, 240.0, True, negative_zero=False),  # as e4m3fn
    torch.float8_e5m2fnuz: Format(2, -15, 57344.0, True, negative_zero=False),  # as e5m2
}

# The slack, in multiples of half a float32 step (2**-24) of the terms' magnitudes.
HALF_STEP = 2.0**-24
ROTATE_STEPS = 4  # two products and a sum, fused or not: 2 at worst, doubled
NORM_STEPS = 32  # a sum of up to 576 squares in any order, rsqrt, two products
DIVIDE_STEPS = 4  # a division, or a reciprocal and a product
TINY = 2.0**-149  # a product that underflows


def _decode_table(
    exponent_bits: int, mantissa_bits: int, *, has_infinity: bool = False, fnuz: bool = False
) -> Array:
    """The value of each code. FNUZ formats have a bias one greater, no infinity, and their only
    NaN where the others have -0."""
    table = np.zeros(256)
    bias = 2 ** (exponent_bits - 1) - (not fnuz)
    top = 2**exponent_bits - 1
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent = (code >> mantissa_bits) & top
        mantissa = code & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits
        if has_infinity and exponent == top:
            value = np.inf if mantissa == 0 else np.nan
        elif (fnuz and code == 0x80) or not (fnuz or has_infinity or code & 0x7F != 0x7F):
            value = np.nan
        elif exponent == 0:
            value = fraction * 2.0 ** (1 - bias)
        else:
            value = (1 + fraction) * 2.0 ** (exponent - bias)
        table[code] = sign * value
    return table


_DECODE_FP8 = {
    torch.float8_e4m3fn: _decode_table(4, 3),
    torch.float8_e5m2: _decode_table(5, 2, has_infinity=True),
    torch.float8_e4m3fnuz: _decode_table(4, 3, fnuz=True),
    torch.float8_e5m2fnuz: _decode_table(5, 2, fnuz=True),
}


def decode(tensor: torch.Tensor) -> Array:
    """The exact values of a float tensor."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype in _DECODE_FP8:
        return _DECODE_FP8[plain.dtype][plain.view(torch.uint8).numpy()]
    if plain.dtype is torch.bfloat16:
        bits = plain.view(torch.int16).numpy().astype(np.int32) << 16
        with np.errstate(invalid="ignore"):
            return bits.view(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return plain.numpy().astype(np.float64)


def bounds(dtype: torch.dtype, exact: Array, slack: Array) -> tuple[Array, Array]:
    """Least and greatest value that may stand where `exact` was to be stored."""
    form = FORMATS[dtype]
    slack = np.where(np.isfinite(exact), slack, 0.0)
    with np.errstate(invalid="ignore"):
        return form.round(exact - slack), form.round(exact + slack)
