"""What has been decided in this process, so that a repeated call costs one look-up.

Everything here follows from a call's metadata and the settings; it is dropped when a kernel is
registered or a setting changes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

LAUNCH_LIMIT = 4096
"""Bound launches kept of an op; each prefill length adds one, so a long-lived server must not keep
them all."""


class Table(Protocol):
    """Remembers the launches of an op."""

    def clear(self) -> None: ...

    def __len__(self) -> int: ...


selections: dict[Hashable, Any] = {}
"""Another dictionary each time that decisions are forgotten: who takes it before deciding remembers
nothing that other threads have overtaken."""
chosen: dict[str, str] = {}
"""op -> label of the kernel that the last bound call of it got."""
_tables: list[Table] = []


def remember(table: Table) -> None:
    """Clear `table` too when decisions are forgotten."""
    _tables.append(table)


def make_room(table: Table) -> None:
    """Keep `table` within the limit when one more launch comes."""
    if len(table) >= LAUNCH_LIMIT:
        table.clear()


def launches() -> int:
    """How many launches are remembered, of all ops."""
    return sum(map(len, _tables))


def clear() -> None:
    """Forget every decision, those included that other threads are about to make."""
    global selections
    # Launches last: one that is bound after they are forgotten is remembered, so it must not find
    # an old selection.
    selections = {}
    chosen.clear()
    for table in _tables:
        table.clear()
