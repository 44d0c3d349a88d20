"""The rotations of a model's layers, as its config gives them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ropool.errors import RopoolError
from ropool.rotary import RotaryConfig, StackedRotary


class Rotations(NamedTuple):
    """What the layers of a model rotate by."""

    layers: list[StackedRotary]
    """One for each layer; layers that rotate alike share it."""
    switch: int | None
    """See `ModelSpec.rotary_switch`."""
    streams: int
    """See `ModelSpec.position_streams`."""


def read_configs(config: Any) -> list[RotaryConfig]:
    """The rotation of each layer; they may differ by the kind of layer. Raises `RopoolError` for
    one that ropool cannot express."""
    layers: int = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [None] * layers
    try:
        by_kind = {kind: RotaryConfig.from_hf(config, kind) for kind in set(kinds)}
    except ValueError as error:
        raise RopoolError(str(error)) from error
    return [by_kind[kind] for kind in kinds[:layers]]


def allocate(config: Any, device: torch.device) -> Rotations:
    """The tables for the whole context of a model. Raises `RopoolError` for rotations that ropool
    cannot express, or that the requests of one batch cannot share."""
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
    return Rotations([tables[rotation] for rotation in configs], switches.pop(), streams.pop())
