"""One small record a frequency scaling: a config holds the options of its own variant and no other,
and a bad option is refused where it is written rather than where it is used."""

from __future__ import annotations

import math
from dataclasses import dataclass


def require(ok: bool, where: str, option: str, value: object, allowed: str) -> None:
    """Raise `ValueError` naming the option, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"ropool.{where}: {option} is {value!r}; allowed: {allowed}")


def is_int(value: object, least: int) -> bool:
    """Whether `value` is an integer of at least `least`; `True` and `False` are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object, above: float) -> bool:
    """Whether `value` is a finite number above `above`; `True` and `False` are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > above


def _require_factor(record: object, value: object) -> None:
    allowed = "a finite number of at least 1"
    ok = is_number(value, 0) and value >= 1  # type: ignore[operator]
    require(ok, type(record).__name__, "factor", value, allowed)


def _require_length(record: object, value: object) -> None:
    # Every formula that uses it takes its logarithm.
    allowed = "an integer of at least 2"
    require(is_int(value, 2), type(record).__name__, "original_max_position", value, allowed)


def _require_positive(record: object, option: str, value: object) -> None:
    where = type(record).__name__
    require(is_number(value, 0), where, option, value, "a finite number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _require_factor(self, self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicNTKScaling:
    """The base grows with the sequence, beyond `original_max_position` tokens."""

    factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _require_factor(self, self.factor)
        _require_length(self, self.original_max_position)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN: slow frequencies interpolated, fast ones kept, a ramp between them.

    The attention factor is `attention_factor` where given; otherwise
    `m(mscale) / m(mscale_all_dim)` where both are given and not 0 (DeepSeek), otherwise `m(1)`,
    with `m(s) = 0.1 * s * ln(factor) + 1`.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    """Rotations over the original context from which a frequency is kept."""
    beta_slow: float = 1.0
    """Rotations over the original context up to which a frequency is divided by `factor`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    """Round the ends of the ramp outwards to whole dims."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        _require_factor(self, self.factor)
        _require_length(self, self.original_max_position)
        _require_positive(self, "beta_slow", self.beta_slow)
        ok = is_number(self.beta_fast, self.beta_slow)
        require(ok, where, "beta_fast", self.beta_fast, f"above beta_slow ({self.beta_slow})")
        for option in ("mscale", "mscale_all_dim"):
            value = getattr(self, option)
            ok = value is None or value == 0 or is_number(value, 0)
            require(ok, where, option, value, "None or a finite number of at least 0")
        if self.attention_factor is not None:
            _require_positive(self, "attention_factor", self.attention_factor)
        require(isinstance(self.truncate, bool), where, "truncate", self.truncate, "True, False")


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a blend between them."""

    factor: float
    original_max_position: int
    low_freq_factor: float
    high_freq_factor: float

    def __post_init__(self) -> None:
        _require_factor(self, self.factor)
        _require_length(self, self.original_max_position)
        _require_positive(self, "low_freq_factor", self.low_freq_factor)
        ok = is_number(self.high_freq_factor, self.low_freq_factor)
        allowed = f"above low_freq_factor ({self.low_freq_factor})"
        require(ok, type(self).__name__, "high_freq_factor", self.high_freq_factor, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE: each frequency divided by a factor of its own; one set for sequences of up to
    `original_max_position` tokens, another for longer ones.

    An attention factor of `None` is `sqrt(1 + ln(factor) / ln(original_max_position))`.
    """

    short_factor: tuple[float, ...]
    """`R/2` divisors."""
    long_factor: tuple[float, ...]
    """`R/2` divisors."""
    original_max_position: int
    factor: float
    """How many times longer than `original_max_position` the model's context is."""
    short_attention_factor: float | None = None
    long_attention_factor: float | None = None

    def __post_init__(self) -> None:
        for option in ("short_factor", "long_factor"):
            value = getattr(self, option)
            ok = isinstance(value, tuple) and all(is_number(item, 0) for item in value)
            allowed = "a tuple of R/2 finite numbers above 0"
            require(ok, type(self).__name__, option, value, allowed)
        _require_length(self, self.original_max_position)
        _require_factor(self, self.factor)
        for option in ("short_attention_factor", "long_attention_factor"):
            if (value := getattr(self, option)) is not None:
                _require_positive(self, option, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProportionalScaling:
    """The first `rotated_pairs` frequencies of the whole head rotate, the others are 0.

    Not the same as partial rotary: the exponents run over the whole head, and so do the pairs.
    """

    rotated_pairs: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        allowed = "an integer of at least 1"
        ok = is_int(self.rotated_pairs, 1)
        require(ok, type(self).__name__, "rotated_pairs", self.rotated_pairs, allowed)
        _require_factor(self, self.factor)


Scaling = (
    LinearScaling
    | DynamicNTKScaling
    | YarnScaling
    | Llama3Scaling
    | LongRopeScaling
    | ProportionalScaling
)
