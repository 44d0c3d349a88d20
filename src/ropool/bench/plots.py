"""One picture an op: time against tokens, with the floor that the machine's copy bandwidth sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ropool.bench.measure import Row

COLOURS = {
    "ropool.reference": "#8c8c8c",
    "torch.eager": "#d95f02",
    "torch.compiled": "#7570b3",
    "ropool.cpu": "#1b9e77",
    "ropool.triton": "#1f78b4",
    "ropool.cuda": "#1b9e77",
    "copy": "#555555",
    "copy.pdl": "#aaaaaa",
}
OTHER_COLOURS = (
    "#e7298a", "#a6761d", "#66a61e", "#e6ab02", "#17becf", "#9467bd", "#d62728", "#bcbd22",
)  # fmt: skip
FLOOR_COLOUR = "#000000"


def draw(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """A PNG for each op that has figures, named after it. Wrong results are not drawn."""
    paths = []
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op and row.p50_us is not None and row.correct]
        if mine:
            paths.append(folder / f"{op.rstrip('_')}.png")
            draw_op(mine, title).savefig(paths[-1], dpi=130)
    return paths


def draw_op(rows: Sequence[Row], title: str) -> Figure:
    """Heads from top to bottom, dtypes from left to right."""
    heads = list(dict.fromkeys(map(heads_of, rows)))
    dtypes = list(dict.fromkeys(map(dtypes_of, rows)))
    colours = colour_map(rows)
    figure = Figure(figsize=(1.2 + 4.6 * len(dtypes), 1.4 + 3.4 * len(heads)), layout="constrained")
    axes = figure.subplots(len(heads), len(dtypes), squeeze=False, sharex=True)
    for i, shape in enumerate(heads):
        for j, dtype in enumerate(dtypes):
            chosen = [row for row in rows if heads_of(row) == shape and dtypes_of(row) == dtype]
            if not chosen:
                axes[i][j].set_visible(False)
                continue
            draw_axes(axes[i][j], chosen, colours)
            axes[i][j].set_title(f"{shape}\n{dtype}", fontsize=9)
        axes[i][0].set_ylabel("microseconds a call")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", frameon=False,
        ncols=4 if len(dtypes) > 1 else 2, fontsize=9,
    )  # fmt: skip
    figure.suptitle(f"{rows[0].op}  ({title})", fontsize=11)
    return figure


def draw_axes(axis: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """A line for each provider, its p20 to p80 as a band, and the floor."""
    for provider in dict.fromkeys(row.provider for row in rows):
        mine = sorted((row for row in rows if row.provider == provider), key=lambda r: r.tokens)
        tokens = [row.tokens for row in mine]
        axis.plot(
            tokens, [row.p50_us for row in mine], marker="o", markersize=4,
            color=colours[provider], label=provider,
            linewidth=2.2 if provider.startswith("ropool.") else 1.4,
        )  # fmt: skip
        axis.fill_between(
            tokens, [row.p20_us for row in mine], [row.p80_us for row in mine],
            color=colours[provider], alpha=0.15, linewidth=0,
        )  # fmt: skip
    floor = dict(sorted({row.tokens: row.floor_us for row in rows}.items()))
    axis.plot(
        floor.keys(), floor.values(), color=FLOOR_COLOUR, linestyle="--", linewidth=1,
        label="minimum bytes at copy bandwidth",
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    tokens = sorted(floor)
    shown = tokens if len(tokens) < 8 else tokens[:: len(tokens) // 5]
    axis.set_xticks(shown, [str(count) for count in shown])
    axis.minorticks_off()
    axis.grid(True, which="major", alpha=0.3)


def dtypes_of(row: Row) -> str:
    """The dtypes as a title has them, and the norm."""
    pool = f", pool {row.kv_dtype}" if row.kv_dtype not in ("", row.dtype) else ""
    query = f", query {row.q_dtype}" if row.q_dtype else ""
    return f"{row.dtype}{pool}{query}{', norm' if row.norm else ''}"


def heads_of(row: Row) -> str:
    """The heads as a title has them."""
    queries = f"{row.heads_q} query, " if row.heads_q else ""
    if row.latent_dim:
        return f"{queries}latent {row.latent_dim} + {row.head_dim}"
    return f"{queries}{row.heads_kv} KV heads of {row.head_dim}"


def colour_map(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each provider, the same in every picture."""
    others = [p for p in dict.fromkeys(row.provider for row in rows) if p not in COLOURS]
    spare = {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}
    return COLOURS | spare
