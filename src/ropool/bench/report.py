"""The rows on the terminal and in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ropool.bench.measure import Row

BASELINES = {"torch.eager": "x eager", "torch.compiled": "x compiled"}


def table(rows: Sequence[Row]) -> list[str]:
    """One line a row of one workload: times, how many times faster than each baseline, bandwidth on
    minimum bytes as a share of copy bandwidth, and whether the result is right."""
    medians = {row.provider: row.p50_us for row in rows}
    width = max(len(row.provider) for row in rows)
    heads = "".join(f"{title:>12}" for title in BASELINES.values())
    times = "".join(f"{title:>12}" for title in ("p20", "p50 us", "p80"))
    lines = [f"  {'':<{width}}{times}{heads}{'GB/s':>9}{'% copy':>8}  correct"]
    for row in rows:
        if row.p50_us is None or row.gbps is None or row.floor_us is None:
            lines.append(f"  {row.provider:<{width}}  {row.note}")
            continue
        times = "".join(f"{value:>12.2f}" for value in (row.p20_us, row.p50_us, row.p80_us))
        ratios = "".join(f"{ratio(medians.get(name), row.p50_us):>12}" for name in BASELINES)
        share = 100 * row.floor_us / row.p50_us
        verdict = "yes" if row.correct else f"NO: {row.note}"
        lines.append(
            f"  {row.provider:<{width}}{times}{ratios}{row.gbps:>9.2f}{share:>8.1f}  {verdict}"
        )
    return lines


def ratio(baseline: float | None, time: float) -> str:
    """How many times faster than the baseline, which may not have run."""
    return "-" if baseline is None else f"{baseline / time:.2f}"


def write(rows: Sequence[Row], machine: dict[str, Any], folder: Path) -> None:
    """`results.json`, `results.csv` and `machine.json` in `folder`."""
    (folder / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    write_records([asdict(row) for row in rows], folder / "results")


def write_records(records: Sequence[dict[str, Any]], stem: Path) -> None:
    """`stem.json` and `stem.csv`; all records have the same fields."""
    stem.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0])
        writer.writerows(map(cell, record.values()) for record in records)


def cell(value: object) -> object:
    """A value as CSV has it: `true`, `false`, and nothing for what was not measured."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else value
