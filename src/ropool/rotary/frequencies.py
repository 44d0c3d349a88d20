"""The frequencies of every variant, one function each, in float64 so that the only rounding is the
table's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ropool.rotary.config import RotaryConfig
from ropool.rotary.scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    YarnScaling,
    is_int,
    require,
)


def inv_freq(config: RotaryConfig, seq_len: int | None = None) -> Tensor:
    """Return the `[R/2]` float64 inverse frequencies, angles a position, on the CPU.

    `seq_len` is the length of the sequence. Only dynamic NTK and LongRoPE depend on it; `None` is
    a sequence within the original context.
    """
    _check_length(seq_len)
    theta, dim = config.theta, config.rotary_dim
    match config.scaling:
        case None:
            return default_frequencies(theta, dim)
        case LinearScaling() as scaling:
            return linear_frequencies(theta, dim, scaling)
        case DynamicNTKScaling() as scaling:
            return dynamic_ntk_frequencies(theta, dim, scaling, seq_len)
        case YarnScaling() as scaling:
            return yarn_frequencies(theta, dim, scaling)
        case Llama3Scaling() as scaling:
            return llama3_frequencies(theta, dim, scaling)
        case LongRopeScaling() as scaling:
            return longrope_frequencies(theta, dim, scaling, seq_len)
        case ProportionalScaling() as scaling:
            return proportional_frequencies(theta, dim, scaling)


def attention_factor(config: RotaryConfig, seq_len: int | None = None) -> float:
    """Return the factor that cos and sin are multiplied by: 1 but for YaRN and LongRoPE.

    `seq_len` as in `inv_freq`. Formulas: YaRN section 3.4, DeepSeek-V2 section 3.1.3, LongRoPE's
    and Phi-3.5-MoE's released code.
    """
    _check_length(seq_len)
    match config.scaling:
        case YarnScaling() as scaling:
            return _yarn_attention_factor(scaling)
        case LongRopeScaling() as scaling:
            long = _is_long(scaling, seq_len)
            given = scaling.long_attention_factor if long else scaling.short_attention_factor
            if given is not None:
                return float(given)
            log_original = math.log(scaling.original_max_position)
            return math.sqrt(1 + math.log(scaling.factor) / log_original)
        case _:
            return 1.0


def length_range(config: RotaryConfig, seq_len: int) -> tuple[int, int | None]:
    """Return the first and last sequence length that have the frequencies of `seq_len`; a last of
    `None` is no limit."""
    _check_length(seq_len)
    match config.scaling:
        case DynamicNTKScaling(original_max_position=original):
            return (1, original) if seq_len <= original else (seq_len, seq_len)
        case LongRopeScaling(original_max_position=original):
            return (1, original) if seq_len <= original else (original + 1, None)
        case _:
            return 1, None


def default_frequencies(theta: float, dim: int) -> Tensor:
    """`theta ** (-2 i / R)`: RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return torch.pow(float(theta), -exponents)


def linear_frequencies(theta: float, dim: int, scaling: LinearScaling) -> Tensor:
    """Positions divided by `factor`: position interpolation, https://arxiv.org/abs/2306.15595."""
    return default_frequencies(theta, dim) / scaling.factor


def dynamic_ntk_frequencies(
    theta: float, dim: int, scaling: DynamicNTKScaling, seq_len: int | None
) -> Tensor:
    """The base grows with the sequence: dynamic NTK, as u/bloc97 and u/emozilla released it and as
    described in https://arxiv.org/abs/2309.00071, appendix B."""
    original = scaling.original_max_position
    length = max(seq_len or original, original)
    alpha = scaling.factor * length / original - (scaling.factor - 1)
    return default_frequencies(theta * alpha ** (dim / (dim - 2)), dim)


def yarn_frequencies(theta: float, dim: int, scaling: YarnScaling) -> Tensor:
    """ "NTK-by-parts": YaRN, https://arxiv.org/abs/2309.00071, section 3.2, with the ramp over the
    index of the frequency as in its released code."""

    def index_of(rotations: float) -> float:
        """The (real) frequency index that turns `rotations` times in the original context."""
        wavelength = scaling.original_max_position / rotations
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper limit is dim - 1, not dim / 2 - 1, in the released code that checkpoints follow.
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)
    interpolated = ramp.clamp(0, 1)
    plain = default_frequencies(theta, dim)
    return plain / scaling.factor * interpolated + plain * (1 - interpolated)


def _yarn_attention_factor(scaling: YarnScaling) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def llama3_frequencies(theta: float, dim: int, scaling: Llama3Scaling) -> Tensor:
    """By wavelength, as in the released code of Llama 3.1, https://arxiv.org/abs/2407.21783."""
    plain = default_frequencies(theta, dim)
    turns = scaling.original_max_position * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # How much of the plain frequency is kept: nothing up to `low` turns of the original context,
    # all of it from `high` turns.
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept


def longrope_frequencies(
    theta: float, dim: int, scaling: LongRopeScaling, seq_len: int | None
) -> Tensor:
    """A divisor for each frequency: LongRoPE, https://arxiv.org/abs/2402.13753."""
    long = _is_long(scaling, seq_len)
    factors = scaling.long_factor if long else scaling.short_factor
    return default_frequencies(theta, dim) / torch.tensor(factors, dtype=torch.float64)


def proportional_frequencies(theta: float, dim: int, scaling: ProportionalScaling) -> Tensor:
    """Frequencies of the whole head, all but the first `rotated_pairs` of them 0: transformers'
    `proportional` type (Gemma 4)."""
    frequencies = default_frequencies(theta, dim) / scaling.factor
    frequencies[scaling.rotated_pairs :] = 0
    return frequencies


def _is_long(scaling: LongRopeScaling, seq_len: int | None) -> bool:
    return seq_len is not None and seq_len > scaling.original_max_position


def _check_length(seq_len: int | None) -> None:
    ok = seq_len is None or is_int(seq_len, 1)
    require(ok, "rotary", "seq_len", seq_len, "an integer of at least 1")
