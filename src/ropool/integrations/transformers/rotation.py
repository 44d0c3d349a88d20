"""The rotations of a model's layers, as its config gives them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropool.errors import RopoolError
from ropool.rotary import (
    LongRopeScaling,
    RotaryConfig,
    StackedRotary,
    attention_factor,
    inv_freq,
)


class Rotations(NamedTuple):
    """What the layers of a model rotate by."""

    layers: list[StackedRotary]
    """One for each layer; layers that rotate alike share it."""
    switch: int | None
    """See `ModelSpec.rotary_switch`."""
    streams: int
    """See `ModelSpec.position_streams`."""


def _layer_kinds(config: Any) -> list[str | None]:
    layers: int = config.num_hidden_layers
    return (getattr(config, "layer_types", None) or [None] * layers)[:layers]


def read_configs(config: Any) -> list[RotaryConfig]:
    """The rotation of each layer; they may differ by the kind of layer. Raises `RopoolError` for
    one that ropool cannot express."""
    kinds = _layer_kinds(config)
    try:
        by_kind = {kind: RotaryConfig.from_hf(config, kind) for kind in set(kinds)}
    except ValueError as error:
        raise RopoolError(str(error)) from error
    return [by_kind[kind] for kind in kinds]


def allocate(config: Any, module: Any, device: torch.device) -> Rotations:
    """The tables for the whole context of a model whose own rotary module is `module`.

    Raises `RopoolError` for rotations that ropool cannot express, that the requests of one batch
    cannot share, or that are not those of the module.
    """
    configs = read_configs(config)
    context: int = config.max_position_embeddings
    tables = {rotation: StackedRotary(rotation, context, device=device) for rotation in configs}
    switches = {table.switch for table in tables.values()}
    if len(switches) > 1:
        raise RopoolError(
            f"the rotations of the model's layers change at different lengths, {switches}; "
            "one is covered"
        )
    streams = {3 if rotation.mrope_section else 1 for rotation in configs}
    if len(streams) > 1 or (streams == {3} and switches != {None}):
        raise RopoolError("M-RoPE is covered in all layers alike and without LongRoPE only")
    for kind, rotation in dict(zip(_layer_kinds(config), configs, strict=True)).items():
        check_module(module, kind, rotation)
    return Rotations([tables[rotation] for rotation in configs], switches.pop(), streams.pop())


def check_module(module: Any, kind: str | None, rotation: RotaryConfig) -> None:
    """Raise `RopoolError` when the frequencies or the attention factor of a model's rotary module,
    for layers of this kind, are not those of `rotation`: the config then says something that the
    model's code reads otherwise."""
    prefix = f"{kind}_" if hasattr(module, f"{kind}_inv_freq") else ""
    short: Tensor = getattr(module, f"{prefix}original_inv_freq")
    expected: list[tuple[int | None, Tensor]] = [(None, short)]
    if isinstance(rotation.scaling, LongRopeScaling):
        length = rotation.scaling.original_max_position + 1
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        layer_type = kind if prefix else None
        long, _ = compute(module.config, short.device, length, layer_type=layer_type)
        expected.append((length, long))
    factor: float = getattr(module, f"{prefix}attention_scaling")
    # The module computes in float32, and a model that was cast keeps them rounded.
    tolerance = max(1e-5, torch.finfo(short.dtype).eps)
    for seq_len, theirs in expected:
        ours, theirs = inv_freq(rotation, seq_len), theirs.to("cpu", torch.float64)
        same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=tolerance, atol=0)
        if not same or not math.isclose(attention_factor(rotation, seq_len), factor, rel_tol=1e-5):
            layers = f" of its {kind} layers" if prefix else ""
            raise RopoolError(
                f"cannot run the model: transformers rotates Q and K{layers} by other frequencies "
                "than ropool reads in the config's rope parameters"
            )
