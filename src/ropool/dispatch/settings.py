"""The process-wide settings: `ROPOOL_BACKEND` and `ROPOOL_CHECK`, read on first use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import EllipsisType

from ropool.dispatch import cache, registry


@dataclass(frozen=True, slots=True)
class Settings:
    """`backend`: run every op on this backend or raise (`None`: the best that can). `check`: raise
    `IndexError` for slots and positions that are out of range, which costs a host read of both in
    every call."""

    backend: str | None = None
    check: bool = False

    def __post_init__(self) -> None:
        known = [spec.name for spec in registry.backends()]
        if self.backend is not None and self.backend not in known:
            raise ValueError(
                f"ropool: backend {self.backend!r} (ROPOOL_BACKEND) is unknown; "
                f"known: {', '.join(known)}"
            )


_current: Settings | None = None


def current() -> Settings:
    """The settings in force. Raises `ValueError` when an environment variable holds a value that is
    not allowed."""
    global _current
    if _current is None:
        check = os.environ.get("ROPOOL_CHECK", "")
        if check not in ("", "0", "1"):
            raise ValueError(f"ropool: ROPOOL_CHECK is {check!r}; allowed: 0, 1")
        _current = Settings(os.environ.get("ROPOOL_BACKEND") or None, check == "1")
    return _current


@contextmanager
def override(
    *, backend: str | EllipsisType | None = ..., check: bool | None = None
) -> Iterator[Settings]:
    """Use other settings within a `with` block, in every thread of the process; options not given
    stay as they are."""
    global _current
    before = current()
    changed = before
    if backend is not ...:
        changed = replace(changed, backend=backend)
    if check is not None:
        changed = replace(changed, check=check)
    _current = changed
    cache.clear()
    try:
        yield changed
    finally:
        _current = before
        cache.clear()
