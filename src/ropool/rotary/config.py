"""What defines a rotation, in one frozen record. Tables are computed from it and from nothing else,
so no frequency is ever rebuilt from a base alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ropool.rotary.scaling import (
    DynamicNTKScaling,
    LongRopeScaling,
    ProportionalScaling,
    Scaling,
    is_int,
    is_number,
    require,
)


class RotaryOptions(TypedDict):
    """The keyword arguments by which the rotating ops know a config's pairs and streams."""

    interleaved: bool
    mrope_section: tuple[int, int, int] | None
    mrope_interleaved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """A rotary position embedding: its frequencies, the dims that rotate and how they pair.

    Raises `ValueError` naming the option, its value and what is allowed. Equal configs have equal
    tables; a config is hashable.
    """

    head_dim: int
    """`D`. For MLA, the width of the rope part, which is `R`."""
    rotary_dim: int
    """`R`, the width of the table: dims `0..R` rotate, `R..D` pass through."""
    theta: float
    """Base of the frequencies, `theta ** (-2 i / R)` before scaling."""
    scaling: Scaling | None = None
    """What is done to the frequencies; `None` is the original RoPE."""
    interleaved: bool = False
    """Pairs are `(2i, 2i+1)`; otherwise (neox) `(i, i + R/2)`."""
    mrope_section: tuple[int, int, int] | None = None
    """M-RoPE: how many of the `R/2` frequencies follow the temporal, height and width position."""
    mrope_interleaved: bool = False
    """The frequencies of the three streams alternate; otherwise they stand in three blocks."""
    max_position: int | None = None
    """Positions the model was made for: the default height of a `RotaryEmbedding`'s table."""

    def __post_init__(self) -> None:
        def check(ok: bool, option: str, allowed: str) -> None:
            require(ok, "RotaryConfig", option, getattr(self, option), allowed)

        check(is_int(self.head_dim, 2), "head_dim", "an integer of at least 2")
        ok = is_int(self.rotary_dim, 2) and self.rotary_dim <= self.head_dim
        ok = ok and self.rotary_dim % 2 == 0
        check(ok, "rotary_dim", f"an even integer from 2 to head_dim ({self.head_dim})")
        check(is_number(self.theta, 1), "theta", "a finite number above 1")
        ok = self.scaling is None or isinstance(self.scaling, Scaling)
        check(ok, "scaling", "None or a scaling of ropool.rotary")
        for option in ("interleaved", "mrope_interleaved"):
            check(isinstance(getattr(self, option), bool), option, "True, False")
        ok = self.max_position is None or is_int(self.max_position, 1)
        check(ok, "max_position", "None or an integer of at least 1")
        self._check_mrope()
        self._check_scaling_width()

    def _check_mrope(self) -> None:
        section, half = self.mrope_section, self.rotary_dim // 2
        if section is None:
            require(
                not self.mrope_interleaved,
                "RotaryConfig",
                "mrope_interleaved",
                self.mrope_interleaved,
                "False, without mrope_section",
            )
            return
        ok = isinstance(section, tuple) and len(section) == 3
        ok = ok and all(is_int(size, 0) for size in section) and sum(section) == half
        allowed = f"None or a tuple of three integers of at least 0 that sum to R/2 ({half})"
        require(ok, "RotaryConfig", "mrope_section", section, allowed)

    def _check_scaling_width(self) -> None:
        half = self.rotary_dim // 2
        match self.scaling:
            case LongRopeScaling() as scaling:
                for option in ("short_factor", "long_factor"):
                    value = getattr(scaling, option)
                    allowed = f"R/2 ({half}) numbers, not {len(value)}"
                    require(len(value) == half, "LongRopeScaling", option, value, allowed)
            case ProportionalScaling(rotated_pairs=pairs):
                allowed = f"at most R/2 ({half})"
                require(pairs <= half, "ProportionalScaling", "rotated_pairs", pairs, allowed)
                require(
                    self.rotary_dim == self.head_dim,
                    "RotaryConfig",
                    "rotary_dim",
                    self.rotary_dim,
                    f"head_dim ({self.head_dim}), with proportional frequencies",
                )
            case DynamicNTKScaling():
                # The exponent of the formula is R / (R - 2).
                allowed = "at least 4, with dynamic NTK scaling"
                require(half > 1, "RotaryConfig", "rotary_dim", self.rotary_dim, allowed)
            case _:
                pass

    @classmethod
    def from_hf(cls, config: object, layer_type: str | None = None) -> RotaryConfig:
        """Read the rotation of a Hugging Face config: a config object of `transformers` or the dict
        of a `config.json`, in the form of transformers 5 (`rope_parameters`) or the older one
        (`rope_theta` and `rope_scaling`).

        `layer_type` names the kind of layer (`full_attention`, `sliding_attention`) where layers of
        a model rotate differently; it is required there, and has no effect on other models. Of a
        multimodal config the text model is read. The pair style is the one of the model family
        (`model_type`); a family that ropool does not know rotates neox pairs, as most do.

        What stands outside the rotation is not read: which layers rotate at all, softmax scales
        (DeepSeek's `mscale_all_dim` enters there a second time), and scales of Q by position
        (`llama_4_scaling_beta`).

        Raises `ValueError` when a value is missing or a config cannot be expressed: nothing is
        approximated, and a missing base is not guessed.
        """
        from ropool.rotary.hf import read_config

        return read_config(config, layer_type)

    @property
    def options(self) -> RotaryOptions:
        """The keyword arguments by which the rotating ops know this config's pairs and streams."""
        return RotaryOptions(
            interleaved=self.interleaved,
            mrope_section=self.mrope_section,
            mrope_interleaved=self.mrope_interleaved,
        )
