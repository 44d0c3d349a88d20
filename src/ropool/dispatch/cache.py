"""What has been decided in this process, so that a repeated call costs one dictionary look-up.

Everything here follows from a call's metadata and the settings; it is dropped when a kernel is
registered or a setting changes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ropool.dispatch.spec import Launch

LAUNCH_LIMIT = 4096
"""Bound launches kept; each prefill length adds one, so a long-lived server must not keep them all.
"""

launches: dict[Hashable, Launch] = {}
selections: dict[Hashable, Any] = {}
chosen: dict[str, str] = {}
"""op -> label of the kernel that the last bound call of it got."""


def keep(signature: Hashable, launch: Launch) -> None:
    """Remember a launch for later calls with the same signature."""
    if len(launches) >= LAUNCH_LIMIT:
        launches.clear()
    launches[signature] = launch


def clear() -> None:
    """Forget every decision."""
    launches.clear()
    selections.clear()
    chosen.clear()
