"""Tuning tables: how a kernel is best laid out on a device, as measured on a device of that name.

A table belongs to one backend and one device name. Those that come with ropool stand in `tables/`;
`ropool tune` writes the user's, whose entries go before ours. What a choice means is its backend's
matter: here it is a record of plain values. A device without a table gets the backend's default,
never the numbers of another device.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from ropool.dispatch import cache, registry
from ropool.dispatch.key import Key
from ropool.dispatch.spec import load
from ropool.dispatch.tuning_table import Choice, Subject, Table, dump, file_name, parse, subject

__all__ = [
    "Choice",
    "Subject",
    "Table",
    "check",
    "choice_of",
    "dump",
    "file_name",
    "forget",
    "parse",
    "subject",
    "table_of",
    "trying",
    "user_folder",
    "writable",
    "write",
]


def user_folder() -> Path:
    """Where the user's tables are: `ROPOOL_TUNING`, or `ropool/tuning` in the user's configuration
    directory."""
    named = os.environ.get("ROPOOL_TUNING")
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(named) if named else Path(base, "ropool", "tuning")


def write(table: Table, folder: Path) -> Path:
    """Write `table` into `folder` in one step, in front of what its file there held before; returns
    the file. A file that is no table is replaced. Processes that write at once wait for each
    other, so none loses what another wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(table.backend, table.device)
    with _locked(path):
        whole = _read(path, table.backend, table.device) or Table(table.backend, table.device)
        whole.update(table)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(dump(whole))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    forget()
    return path


def writable(folder: Path) -> None:
    """Make `folder` and a file in it, which is gone again. Raises `OSError` where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
    os.close(descriptor)
    os.unlink(temporary)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the table at `path`: a file beside it, which stays. A file system without
    locks does without."""
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path, backend: str, device: str) -> Table | None:
    """The user's table at `path`, or `None` when no file there can be read. One that is no table of
    `backend` and `device`, or that another user could have written, is named in a warning and left
    out: a call must not fail for what only makes it faster."""
    try:
        with path.open("rb") as file:
            facts, content = os.fstat(file.fileno()), file.read()
    except OSError:
        return None
    try:
        if facts.st_uid not in (os.geteuid(), 0):
            raise ValueError(f"{path} belongs to another user")
        if facts.st_mode & 0o002:
            raise ValueError(f"{path} can be written by everyone")
        table = parse(content, str(path))
        if (table.backend, table.device) != (backend, device):
            raise ValueError(
                f"{path} is the table of {table.backend!r} on {table.device!r}, "
                f"not of {backend!r} on {device!r}"
            )
        check(table, path)
    except ValueError as error:
        warnings.warn(
            f"ropool: {error}; it is ignored: delete it, or write it anew with `ropool tune`",
            stacklevel=2,
        )
        return None
    return table


def check(table: Table, source: object) -> None:
    """Have the backend read what is in `table` in its words. Raises `ValueError`."""
    for spec in registry.backends():
        if spec.name == table.backend and spec.check_tuning:
            try:
                load(spec.check_tuning)(table)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{source}: {type(error).__name__}: {error}") from error


_tables: dict[tuple[str, str], Table] = {}
_trial: Choice | None = None


def table_of(backend: str, device: str) -> Table:
    """What is known of `backend` on `device`: ropool's table, and the user's in front of it. Empty
    when neither exists. Read once a process."""
    tables = _tables
    found = tables.get((backend, device))
    if found is None:
        name = file_name(backend, device)
        found = Table(backend, device)
        ours = resources.files(__package__).joinpath("tables", name)
        if ours.is_file():
            found.update(parse(ours.read_bytes(), str(ours)))
        users = _read(user_folder() / name, backend, device)
        if users is not None:
            found.update(users)
        tables[backend, device] = found
    return found


def choice_of(backend: str, device: str, key: Key, tokens: int) -> Choice | None:
    """The choice for a call of `key` with so many tokens, or `None` when nothing was measured."""
    return _trial if _trial is not None else table_of(backend, device).choice(key, tokens)


@contextmanager
def trying(choice: Choice) -> Iterator[None]:
    """Within the block every call that is bound takes `choice`: how a tuner measures it."""
    global _trial
    before, _trial = _trial, choice
    cache.clear()
    try:
        yield
    finally:
        _trial = before
        cache.clear()


def forget() -> None:
    """Read the tables anew, and decide every call anew."""
    global _tables
    _tables = {}
    cache.clear()
