"""One picture of a run on a GPU: for each op and dtype, at its first head shape, the time over that
of a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ropool.bench.measure import Row
from ropool.bench.summary import COPIES, OURS, Case, Point, cases

COLUMNS = 3
NAME = "over_copy.png"
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#1b9e77", "linewidth": 2.2},
    "ropool.triton": {"color": "#1f78b4"},
    "fastest peer": {"color": "#d95f02"},
    COPIES[1]: {"color": "#aaaaaa"},
}


def draw_ratios(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """The picture, where copies were measured."""
    first: dict[tuple[str, str, str, bool], tuple[Case, list[Point]]] = {}
    for case, points in cases(rows).items():
        kept = [p for p in points if COPIES[0] in p.times]
        if kept:
            first.setdefault((case.op, case.pool, case.query, case.norm), (case, kept))
    if not first:
        return []
    figure = figure_of(list(first.values()))
    figure.suptitle(f"time over that of `{COPIES[0]}`, the same minimum bytes  ({title})")
    figure.savefig(folder / NAME, dpi=110)
    return [folder / NAME]


def figure_of(chosen: Sequence[tuple[Case, list[Point]]]) -> Figure:
    """An axis a case."""
    lines = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(1 + 4.2 * COLUMNS, 1.2 + 2.7 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axis, (case, points) in zip(axes, chosen, strict=False):
        for name, style in STYLES.items():
            found = [(p.tokens, ratio(p, name)) for p in points]
            known = [(tokens, value) for tokens, value in found if value is not None]
            if known:
                [handles[name]] = axis.plot(*zip(*known, strict=True), marker="o", ms=3, **style)
        axis.axhline(1.0, color="black", linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0.5, 3.0)
        axis.set_title(case.title.replace("`", ""), fontsize=8)
        axis.set_xlabel("tokens", fontsize=8)
        axis.grid(True, alpha=0.3)
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    return figure


def ratio(p: Point, name: str) -> float | None:
    """The time of a provider, or of the fastest peer, over the copy's."""
    if name in p.times:
        time: float | None = p.times[name]
    else:
        time = p.peer("") if name == "fastest peer" else None
    return None if time is None else time / p.times[COPIES[0]]
