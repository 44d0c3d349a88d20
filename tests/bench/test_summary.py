"""The summary of a run: ratios worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ropool.bench.measure import Row
from ropool.bench.report import write
from ropool.bench.summary import cases, geometric_mean, read, summary
from ropool.cli.main import main


def measured(provider: str, tokens: int, time: float, **more: object) -> Row:
    row = Row(
        op="store_mla_", provider=provider, device="cuda", dtype="bfloat16", kv_dtype="bfloat16",
        heads_q=0, heads_kv=1, head_dim=64, rotary_dim=0, tokens=tokens, p20_us=time, p50_us=time,
        p80_us=time, min_bytes=100, gbps=1.0, floor_us=1.0, correct=True, version="1",
        latent_dim=512,
    )  # fmt: skip
    return replace(row, **more)


ROWS = [
    measured("ropool.cuda", 1, 1.0),
    measured("copy", 1, 0.9),
    measured("sglang", 1, 2.0),
    measured("vllm", 1, 0.5, correct=False),
    measured("ropool.cuda", 16384, 10.0),
    measured("copy", 16384, 8.0),
    measured("sglang", 16384, 9.0),
    measured("triton.2025", 16384, 50.0),
    measured("flashinfer", 16384, 0.0, p50_us=None, correct=None, note="not supported: x"),
]


def test_points_hold_right_results_and_the_fastest_peer() -> None:
    [(case, points)] = cases(ROWS).items()
    assert case.title == "`store_mla_` -x512+64 bfloat16"
    assert [point.fastest_peer() for point in points] == [("sglang", 2.0), ("sglang", 9.0)]


def test_more_bytes_count_by_the_byte() -> None:
    wide = measured("flashinfer.whole-query", 1, 6.0, min_bytes=300)
    [points] = cases([*ROWS, wide]).values()
    assert points[0].peer("flashinfer.whole-query") == pytest.approx(2.0)
    assert points[0].fastest_peer() == ("sglang", 2.0)


def test_the_summary_says_what_is_met_and_what_is_not() -> None:
    text = "\n".join(summary(ROWS))
    # Copies: sqrt(1 / 0.9 * 10 / 8) = 1.18; peers: sqrt(2 * 0.9) = 1.34.
    expected = "| 1.18 | - | 1.25 | 0.10 | 1.34 | 0.90 (16384, sglang) |"
    assert f"| `store_mla_` -x512+64 bfloat16 {expected}" in text
    assert "fastest peer, 2 points | 1.34 | 1.02 | met |" in text
    assert "triton.2025 at T = 16384 | 5.00 | 4.60 | met |" in text
    assert "1.06 of `copy` from T = 512 | 0 of 1 points | `store_mla_`" in text
    assert "`copy` + 0.15 us below | 1 of 1 points | none |" in text
    assert "1.02 of the fastest peer | 1 of 2 points | `store_mla_`" in text


def test_calls_without_overlap_are_judged_apart() -> None:
    slower = [
        replace(row, serial_us=30.0) if row.provider == "ropool.cuda" else row for row in ROWS
    ]
    [points] = cases(slower, serial=True).values()
    assert [point.ours for point in points] == [30.0, 30.0]
    assert [point.peer("sglang") for point in points] == [2.0, 9.0]
    chained, apart = "\n".join(summary(slower)).split("# Each call after")
    assert "1 of 2 points" in chained and "0 of 2 points" in apart


def test_a_written_run_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(ROWS, {}, tmp_path)
    assert read(tmp_path / "results.csv") == ROWS
    assert main(["bench", "--summary", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "\n".join(summary(ROWS)) + "\n"


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--summary", str(tmp_path)]) == 2
    assert "no results.csv is there" in capsys.readouterr().err


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None
