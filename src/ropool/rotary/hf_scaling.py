"""Reads the scaling of a Hugging Face rope dict whose keys have been checked."""

from __future__ import annotations

from typing import Any

from ropool.rotary import families
from ropool.rotary.hf_fields import ORIGINAL_LENGTH, Fields, refuse
from ropool.rotary.scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Scaling,
    YarnScaling,
)


def read_scaling(
    fields: Fields, rope: dict[str, Any], rope_type: str, head_dim: int, partial: float
) -> Scaling | None:
    """The scaling that the rope parameters `rope` describe."""

    def need(name: str) -> Any:
        if name not in rope:
            refuse(f"{name} is missing; allowed: a value, with rope_type {rope_type!r}")
        return rope[name]

    match rope_type:
        case "linear":
            return LinearScaling(factor=need("factor"))
        case "proportional":
            pairs = int(partial * head_dim // 2)
            return ProportionalScaling(rotated_pairs=pairs, factor=rope.get("factor", 1.0))
        case "dynamic":
            length = _need_length(fields.max_position)
            if rope.get(ORIGINAL_LENGTH, length) != length:
                refuse(
                    f"{ORIGINAL_LENGTH} is {rope[ORIGINAL_LENGTH]!r}; allowed: with rope_type "
                    f"'dynamic', max_position_embeddings ({length}), from which its base grows"
                )
            return DynamicNTKScaling(factor=need("factor"), original_max_position=length)
        case "yarn":
            length = _original_length(fields, rope)
            return YarnScaling(
                factor=_extension(fields, rope, length),
                original_max_position=length,
                beta_fast=rope.get("beta_fast") or 32.0,
                beta_slow=rope.get("beta_slow") or 1.0,
                mscale=rope.get("mscale"),
                mscale_all_dim=rope.get("mscale_all_dim"),
                attention_factor=rope.get("attention_factor"),
                truncate=rope.get("truncate", True),
            )
        case "llama3":
            return Llama3Scaling(
                factor=need("factor"),
                original_max_position=_original_length(fields, rope),
                low_freq_factor=need("low_freq_factor"),
                high_freq_factor=need("high_freq_factor"),
            )
        case "longrope":
            length = _original_length(fields, rope)
            given = rope.get("attention_factor")
            # Others that have them leave them unread.
            mscales = rope if fields.get("model_type") in families.LONGROPE_MSCALES else {}
            return LongRopeScaling(
                short_factor=_numbers("short_factor", need("short_factor")),
                long_factor=_numbers("long_factor", need("long_factor")),
                original_max_position=length,
                # A shorter context than the original one is no extension.
                factor=max(_extension(fields, rope, length), 1.0),
                short_attention_factor=mscales.get("short_mscale", given),
                long_attention_factor=mscales.get("long_mscale", given),
            )
        case _:
            return None


def _numbers(name: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        refuse(f"{name} is {value!r}; allowed: a list of R/2 numbers")
    return tuple(value)


def _original_length(fields: Fields, rope: dict[str, Any]) -> int:
    return _need_length(rope.get(ORIGINAL_LENGTH, fields.max_position))


def _need_length(length: int | None) -> int:
    if length is None:
        refuse(f"{ORIGINAL_LENGTH} and max_position_embeddings are missing; allowed: an integer")
    return length


def _extension(fields: Fields, rope: dict[str, Any], original: int) -> float:
    factor: float | None = rope.get("factor")
    return factor if factor is not None else _need_length(fields.max_position) / original
