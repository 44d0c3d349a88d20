"""The checks of `ROPOOL_CHECK=1`: reads slots and positions on the host before a kernel starts, so
that a caller's mistake raises instead of dropping a token's write."""

from __future__ import annotations

import torch
from torch import Tensor

from ropool.dispatch.key import Options


def check_positions(op: str, positions: Tensor, offsets: Tensor | None, max_position: int) -> None:
    """Raise `IndexError` for the first token whose position is outside the cos/sin cache."""
    where = positions.long() if offsets is None else positions.long() + offsets.long()
    outside = (where < 0) | (where >= max_position)
    if bool(outside.any()):
        *row, token = torch.nonzero(outside)[0].tolist()
        value = int(where[(*row, token)])
        raise IndexError(
            f"ropool.{op}: token {token} has position {value}, "
            f"the cos/sin cache holds positions 0 to {max_position - 1}"
        )


def check_slots(
    op: str, slot_mapping: Tensor, slots: int, window_slot_map: Tensor | None, options: Options
) -> None:
    """Raise `IndexError` for the first token whose slot is past the pool or past the window map;
    padding is no mistake."""
    slot = slot_mapping.long()
    padding = slot < 0
    if options.padding_slot is not None:
        padding |= slot == options.padding_slot
    if window_slot_map is None:
        _refuse(op, "slot", slot, ~padding & (slot >= slots), f"the pool has {slots} slots")
        return
    entries = window_slot_map.shape[0]
    _refuse(
        op, "slot", slot, ~padding & (slot >= entries), f"window_slot_map has {entries} entries"
    )
    if entries:
        mapped = window_slot_map.long()[slot.masked_fill(padding, 0)]
        _refuse(
            op, "window slot", mapped, ~padding & (mapped >= slots), f"the pool has {slots} slots"
        )


def _refuse(op: str, what: str, values: Tensor, wrong: Tensor, limit: str) -> None:
    if bool(wrong.any()):
        token = int(torch.nonzero(wrong)[0])
        raise IndexError(f"ropool.{op}: token {token} has {what} {int(values[token])}, {limit}")
