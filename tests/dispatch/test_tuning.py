"""Tuning tables: found by device and key, the user's in front of ours, never another device's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

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
    return Table("cuda", "Some GPU", {"ropool": "0"}, {"limit": 3}, {SUBJECT: measured})


def test_a_device_without_a_table_gets_nothing(folder: Path) -> None:
    tuning.write(table(t16=2), folder)
    assert tuning.choice_of("cuda", "Some GPU", KEY, 16) == {"rows": 2}
    assert tuning.choice_of("cuda", "Another GPU", KEY, 16) is None
    assert tuning.choice_of("triton", "Some GPU", KEY, 16) is None
    assert tuning.table_of("cuda", "Another GPU").rules == {}


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (15, 1), (17, 2), (63, 2), (200, 3), (10**6, 3)]
)
def test_the_nearest_measured_number_of_tokens_decides(
    folder: Path, tokens: int, rows: int
) -> None:
    tuning.write(table(t8=1, t32=2, t256=3), folder)
    assert tuning.choice_of("cuda", "Some GPU", KEY, tokens) == {"rows": rows}


def test_keys_share_an_entry_when_their_bytes_are_equal(folder: Path) -> None:
    tuning.write(table(t8=1), folder)
    same = replace(KEY, dtype="float16", interleaved=True, position_dtype="int32")
    assert tuning.choice_of("cuda", "Some GPU", same, 8) == {"rows": 1}
    for other in (
        {"heads_q": 64},
        {"dtype": "float32"},
        {"q_norm_dtype": "float32"},
        {"pool_dtype": "float8_e5m2"},
    ):
        assert tuning.choice_of("cuda", "Some GPU", replace(KEY, **other), 8) is None


def test_writing_adds_to_what_was_there(folder: Path) -> None:
    tuning.write(table(t8=1, t32=2), folder)
    path = tuning.write(table(t32=5), folder)
    assert path.name == "cuda-some-gpu.json"
    assert tuning.parse(path.read_text(), "").entries[SUBJECT] == {8: {"rows": 1}, 32: {"rows": 5}}
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_a_table_survives_its_text() -> None:
    before = table(t8=1, t32=2)
    assert tuning.parse(tuning.dump(before), "") == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "backend": 1}'])
def test_a_file_that_is_no_table_is_named(folder: Path, text: str) -> None:
    (folder / "cuda-some-gpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"cuda-some-gpu.json is no tuning table .*ropool tune"):
        tuning.choice_of("cuda", "Some GPU", KEY, 8)


def test_a_trial_goes_before_every_table(folder: Path) -> None:
    tuning.write(table(t8=1), folder)
    cache.launches["bound"] = lambda args: None
    with tuning.trying({"rows": 9}):
        assert not cache.launches
        assert tuning.choice_of("cuda", "Another GPU", KEY, 8) == {"rows": 9}
    assert tuning.choice_of("cuda", "Some GPU", KEY, 8) == {"rows": 1}


def test_the_tables_of_the_package_are_tables() -> None:
    for path in resources.files("ropool.dispatch").joinpath("tables").iterdir():
        found = tuning.parse(path.read_text(), path.name)
        assert tuning.file_name(found.backend, found.device) == path.name
