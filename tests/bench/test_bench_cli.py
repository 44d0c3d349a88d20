"""`ropool bench` from the command line: files, columns and units, and what it says of mistakes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ropool.bench import inputs, plots, providers, timing
from ropool.bench.inputs import Inputs
from ropool.bench.provider import Provider
from ropool.bench.providers import choose
from ropool.bench.workload import Workload
from ropool.cli.main import main
from ropool.ops import _launches

CONTRACT = [
    *("op", "provider", "device", "dtype", "kv_dtype", "heads_q", "heads_kv", "head_dim"),
    *("rotary_dim", "tokens", "p20_us", "p50_us", "p80_us", "min_bytes", "gbps", "floor_us"),
    *("correct", "version"),
]
SMALL = ["--heads", "4x2x8", "--dtype", "float32", "--rounds", "3"]
Bench = Callable[..., int]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the command with little to copy and little to rotate over, and silent about a busy
    machine."""
    monkeypatch.setattr("ropool.cli.bench.load_average", lambda: None)
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 20)
    monkeypatch.setitem(inputs.ROTATE_BYTES, "cpu", 1 << 16)
    return lambda *arguments: main(["bench", *arguments])


def add_provider(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    build: Callable[[Workload], Callable],
    **more: object,
) -> None:
    provider = Provider(name, lambda: "1.0", lambda device: None, build, **more)  # type: ignore[arg-type]
    monkeypatch.setitem(providers._providers, name, provider)


def test_files_columns_and_units(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "folder"
    wanted = [*SMALL, "--tokens", "1,7", "--providers", "ropool.reference,torch.eager"]
    assert bench("rope_store_kv_", "store_kv_", *wanted, "--out", str(out)) == 0
    rows = json.loads((out / "results.json").read_text())
    with (out / "results.csv").open() as file:
        reader = csv.DictReader(file)
        records = list(reader)
        assert list(reader.fieldnames or [])[: len(CONTRACT)] == CONTRACT
    assert len(rows) == len(records) == 2 * 2 * 2
    for row, record in zip(rows, records, strict=True):
        assert row["device"] == "cpu" and row["dtype"] == row["kv_dtype"] == "float32"
        assert row["correct"] is True and record["correct"] == "true"
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert float(record["p50_us"]) == row["p50_us"]
        assert row["gbps"] == pytest.approx(row["min_bytes"] / row["p50_us"] / 1e3, abs=1e-4)
        assert row["floor_us"] > 0
    assert [rows[0][name] for name in ("heads_q", "heads_kv", "head_dim", "rotary_dim")] == [
        4,
        2,
        8,
        8,
    ]
    assert rows[0]["min_bytes"] == 256 + 256 + 32 + 16
    for name in ("rope_store_kv.png", "store_kv.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    machine = json.loads((out / "machine.json").read_text())
    assert machine["torch"] == torch.__version__ and machine["cpu"] and machine["cores"] >= 1
    printed = capsys.readouterr().out
    assert "x eager" in printed and "% copy" in printed and str(out) in printed


def test_a_wrong_result_is_reported_and_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    [right] = choose(["ropool.reference"])

    def build(workload: Workload) -> Callable[[Inputs], None]:
        call = right.build(workload)

        def swapped(x: Inputs) -> None:
            call(replace(x, slots=x.slots.roll(1)))

        return swapped

    add_provider(monkeypatch, "broken", build)
    wanted = ["rope_store_kv_", *SMALL, "--tokens", "3", "--providers", "broken,ropool.reference"]
    assert bench(*wanted, "--out", str(tmp_path)) == 1
    broken, reference = json.loads((tmp_path / "results.json").read_text())
    assert broken["correct"] is False and "k_pool" in broken["note"] and broken["p50_us"] > 0
    assert reference["correct"] is True
    assert "NO: k_pool" in capsys.readouterr().out


def test_what_cannot_run_has_a_row_that_says_why(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def build(workload: Workload) -> Callable[[Inputs], None]:
        raise ImportError("no such kernel\nand more")

    add_provider(monkeypatch, "raises", build)
    add_provider(monkeypatch, "narrow", build, why_not=lambda workload: "no float32")
    wanted = ["rope_", *SMALL, "--tokens", "2", "--providers", "raises,narrow,ropool.reference"]
    assert bench(*wanted, "--out", str(tmp_path)) == 0
    raises, narrow, reference = json.loads((tmp_path / "results.json").read_text())
    assert raises["note"] == "failed: ImportError: no such kernel"
    assert narrow["note"] == "not supported: no float32"
    assert raises["p50_us"] is None and raises["correct"] is None and raises["min_bytes"] > 0
    assert reference["correct"] is True
    printed = capsys.readouterr().out
    assert raises["note"] in printed and narrow["note"] in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--providers", "fast"], "provider 'fast' is unknown; known: ropool.cpu"),
        (["rotate"], "op 'rotate' is unknown"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
        (["--kv-dtype", "int8"], "KV dtype 'int8' is unknown"),
        (["--heads", "8"], "heads are '8'"),
        (["--tokens", "1,x"], "tokens is 'x'"),
        (["--tokens", ""], "tokens is ''"),
        (["--tokens", "0"], "bench: tokens is '0'; allowed: whole numbers from 1"),
        (["--tokens", "9" * 13], "T=9999999999999 does not fit the memory of cpu"),
        (["--rounds", "0"], "--rounds is 0"),
    ],
)
def test_mistakes_get_one_line(
    bench: Bench, arguments: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert bench(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("ropool: bench: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(bench: Bench, capsys: pytest.CaptureFixture) -> None:
    assert bench("--device", "cuda") == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_overhead_adds_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("ropool.bench.overhead.CALLS", 20)
    monkeypatch.setattr("ropool.bench.overhead.SAMPLES", 5)
    assert bench("--overhead", "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "overhead.json").read_text())
    stages = ["arguments_us", "modes_us", "signature_us", "look_up_us", "launch_us"]
    whole = found["python_us"] + sum(found[stage] for stage in stages)
    assert whole == pytest.approx(found["total_us"])
    compiled = _launches.reader() is not None
    assert all(found[stage] > 0 for stage in (stages if compiled else stages[-1:]))
    assert "signature" in capsys.readouterr().out


def test_a_picture_for_rows_of_every_kind(tmp_path: Path) -> None:
    row = {
        "op": "store_mla_", "device": "cpu", "dtype": "bfloat16", "heads_q": 0, "heads_kv": 1,
        "head_dim": 64, "rotary_dim": 0, "min_bytes": 100, "gbps": 1.0, "version": "1",
        "latent_dim": 512,
    }  # fmt: skip
    rows = [
        plots.Row(**row, provider=p, kv_dtype=kv, tokens=t, p20_us=t, p50_us=t, p80_us=2 * t,
                  floor_us=t / 2, correct=correct)
        for p, correct in (("ropool.cpu", True), ("peer", True), ("wrong", False))
        for kv in ("bfloat16", "fp8_ds_mla")
        for t in (1, 16)
    ]  # fmt: skip
    rows.append(plots.Row(**row | {"gbps": None}, provider="absent", kv_dtype="bfloat16", tokens=1))
    assert plots.draw(rows, tmp_path, "a machine") == [tmp_path / "store_mla.png"]
    figure = plots.draw_op([r for r in rows if r.correct], "a machine")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["ropool.cpu", "peer", "minimum bytes at copy bandwidth"]
