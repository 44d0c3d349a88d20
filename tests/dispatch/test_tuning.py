"""Tuning tables: found by device and key, the user's in front of ours, never another device's."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

import ropool
from ropool.dispatch import cache, tuning
from ropool.dispatch.key import Key
from ropool.dispatch.tuning import Table

KEY = Key(op="rope_", dtype="bfloat16", heads_q=32, heads_kv=8, head_dim=128, rotary_dim=128)
SUBJECT = tuning.subject(KEY)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ROPOOL_TUNING", str(tmp_path))
    tuning.forget()
    yield tmp_path
    tuning.forget()


def table(**choices: int) -> Table:
    """`t16=2`: with 16 tokens two rows."""
    measured = {int(name[1:]): {"rows": rows} for name, rows in choices.items()}
    return Table("reference", "Some GPU", {"ropool": "0"}, {"limit": 3}, {SUBJECT: measured})


def test_a_device_without_a_table_gets_nothing(folder: Path) -> None:
    tuning.write(table(t16=2), folder)
    assert tuning.choice_of("reference", "Some GPU", KEY, 16) == {"rows": 2}
    assert tuning.choice_of("reference", "Another GPU", KEY, 16) is None
    assert tuning.choice_of("triton", "Some GPU", KEY, 16) is None
    assert tuning.table_of("reference", "Another GPU").rules == {}


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (15, 1), (17, 2), (63, 2), (200, 3), (10**6, 3)]
)
def test_the_nearest_measured_number_of_tokens_decides(
    folder: Path, tokens: int, rows: int
) -> None:
    tuning.write(table(t8=1, t32=2, t256=3), folder)
    assert tuning.choice_of("reference", "Some GPU", KEY, tokens) == {"rows": rows}


def test_keys_share_an_entry_when_their_bytes_are_equal(folder: Path) -> None:
    tuning.write(table(t8=1), folder)
    same = replace(KEY, dtype="float16", interleaved=True, position_dtype="int32")
    assert tuning.choice_of("reference", "Some GPU", same, 8) == {"rows": 1}
    for other in (
        {"heads_q": 64},
        {"dtype": "float32"},
        {"q_norm_dtype": "float32"},
        {"pool_dtype": "float8_e5m2"},
    ):
        assert tuning.choice_of("reference", "Some GPU", replace(KEY, **other), 8) is None


def test_writing_adds_to_what_was_there(folder: Path) -> None:
    tuning.write(table(t8=1, t32=2), folder)
    path = tuning.write(table(t32=5), folder)
    assert path.name == "reference-some-gpu.json"
    assert tuning.parse(path.read_text(), "").entries[SUBJECT] == {8: {"rows": 1}, 32: {"rows": 5}}
    assert [p.name for p in folder.glob("[!.]*")] == [path.name]
    assert list(folder.glob(".new-*")) == []


def test_a_table_survives_its_text() -> None:
    before = table(t8=1, t32=2)
    assert tuning.parse(tuning.dump(before), "") == before


def put(folder: Path, content: bytes, backend: str = "reference") -> Path:
    path = folder / tuning.file_name(backend, "Some GPU")
    path.write_bytes(content)
    path.chmod(0o600)
    tuning.forget()
    return path


def text(backend: str = "reference", device: str = "Some GPU", **more: Any) -> bytes:
    """A table with one choice, `choice`, and more fields."""
    entry = {"op": "rope_", "choices": {"1": more.pop("choice", {})}}
    head = {"format": 1, "backend": backend, "device": device, "entries": [entry]}
    return json.dumps(head | more).encode()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[]", b"null", b'{"format": 1,', b"\xff\xfe\x00", b"[" * 100_000),
        *(text(format=99), text(measured_with="abc"), text(entries={"a": 1})),
        *(text(backend="triton"), text(device="Other GPU")),
        text(entries=[{"op": ["x"], "choices": {"1": {}}}]),
        text(entries=[{"op": "rope_", "choices": {"9" * 400: {}}}]),
    ],
    ids=lambda content: content[:70].decode(errors="replace"),
)
def test_a_users_file_that_is_no_table_is_named_and_ignored(folder: Path, content: bytes) -> None:
    path = put(folder, content)
    with pytest.warns(UserWarning, match=f"{path}.*ignored.*`ropool tune`") as warned:
        assert tuning.choice_of("reference", "Some GPU", KEY, 8) is None
        assert tuning.choice_of("reference", "Some GPU", KEY, 9) is None
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="ignored"):
        tuning.write(table(t8=4), folder)
    assert tuning.choice_of("reference", "Some GPU", KEY, 8) == {"rows": 4}


@pytest.mark.parametrize(
    ("backend", "more", "message"),
    [
        ("cuda", {"choice": {"bulk": "false"}}, "bulk is 'false'; allowed: true, false"),
        ("cuda", {"choice": {"early": "no"}}, "early is 'no'; allowed: true, false"),
        ("cuda", {"choice": {"threads": 100}}, "threads is 100"),
        ("cuda", {"rules": {"bulk": 1}}, "not subscriptable"),
        ("cuda", {"rules": {"bulk": {"tokens": 1, "early_bytes": 1, "rows": 64}}}, "threads is 64"),
        ("cuda", {"rules": {"early_turned": [[{}, "x"]]}}, "early_turned is 'x'"),
        ("cuda", {"rules": {"early_copied": True}}, "early_copied is True"),
        ("triton", {"choice": {"warps": True, "vectors": 1}}, "warps True"),
        ("triton", {"choice": {"warps": 4}}, "vectors None"),
        ("metal", {"choice": {"fused": "no"}}, "fused is 'no'"),
        ("metal", {"rules": {"built_in": [{"least_tokens": 4}]}}, "most_heads_kv is None"),
        ("metal", {"rules": {"built_in": [1]}}, "AttributeError"),
    ],
)
def test_what_a_backend_does_not_know_is_named_and_ignored(
    folder: Path, backend: str, more: dict[str, Any], message: str
) -> None:
    usual = {"triton": {"warps": 4, "vectors": 1}, "metal": {"fused": True}}.get(backend, {})
    path = put(folder, text(backend, choice=usual), backend)
    assert tuning.table_of(backend, "Some GPU").entries
    put(folder, text(backend, **{"choice": usual, **more}), backend)
    with pytest.warns(UserWarning, match=f"{path}.*{re.escape(message)}.*ignored"):
        found = tuning.table_of(backend, "Some GPU")
    assert (found.entries, found.rules) == ({}, {})


def test_a_table_that_others_could_have_written_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tuning.write(table(t8=1), folder)
    path.chmod(0o606)
    with pytest.warns(UserWarning, match=r"can be written by everyone; it is ignored"):
        assert tuning.choice_of("reference", "Some GPU", KEY, 8) is None
    path.chmod(0o600)
    facts = list(os.stat(path))
    facts[4] = 4321  # st_uid
    monkeypatch.setattr(os, "fstat", lambda descriptor: os.stat_result(facts))
    tuning.forget()
    with pytest.warns(UserWarning, match=r"belongs to another user; it is ignored"):
        assert tuning.choice_of("reference", "Some GPU", KEY, 8) is None


@pytest.mark.parametrize("error", [PermissionError, NotADirectoryError, OSError])
def test_a_folder_that_cannot_be_read_has_no_tables(
    folder: Path, error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for a user without a home of their own, whose HOME is root's. The rights of files do not
    # stop root, so a test cannot take them away.
    tuning.write(table(t8=1), folder)

    def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            if path.is_relative_to(folder):
                raise error(13, "refused", str(path))
            return method(path, *args, **options)

        return call

    for name in ("open", "stat"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    assert tuning.choice_of("reference", "Some GPU", KEY, 8) is None


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=write_some, args=(folder, first))
        for first in range(0, 80, 20)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    tuning.forget()
    assert len(tuning.table_of("reference", "Some GPU").entries) == 80


def write_some(folder: Path, first: int) -> None:
    for heads in range(first + 1, first + 21):
        entries = {tuning.subject(replace(KEY, heads_q=heads)): {1: {"rows": 1}}}
        tuning.write(Table("reference", "Some GPU", {}, {}, entries), folder)


def test_a_table_that_was_written_while_it_was_read_is_read_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another thread tunes."""
    read = tuning._read

    def overtaken(*file: Any) -> Any:
        found = read(*file)
        monkeypatch.setattr(tuning, "_read", read)
        tuning.write(table(t8=1), folder)
        tuning.forget()
        return found

    monkeypatch.setattr(tuning, "_read", overtaken)
    assert tuning.choice_of("reference", "Some GPU", KEY, 8) is None
    assert tuning.choice_of("reference", "Some GPU", KEY, 8) == {"rows": 1}


def test_a_trial_goes_before_every_table(folder: Path) -> None:
    tuning.write(table(t8=1), folder)
    ropool.rope_(torch.ones(1, 2, 8), None, torch.ones(4, 8), torch.zeros(1, dtype=torch.int32))
    assert cache.launches() > 0
    with tuning.trying({"rows": 9}):
        assert cache.launches() == 0
        assert tuning.choice_of("reference", "Another GPU", KEY, 8) == {"rows": 9}
    assert tuning.choice_of("reference", "Some GPU", KEY, 8) == {"rows": 1}


def test_the_tables_of_the_package_are_tables() -> None:
    for path in resources.files("ropool.dispatch").joinpath("tables").iterdir():
        found = tuning.parse(path.read_text(), path.name)
        assert tuning.file_name(found.backend, found.device) == path.name
        tuning.check(found, path.name)
