"""What a run on a GPU says in short: ours against a copy of the same bytes and against the fastest
peer at each point, and the geometric means over the token counts beside what is aimed at."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ropool.bench.measure import Row

OURS = "ropool.cuda"
COPIES = ("copy", "copy.pdl")
MORE_WORK = "flashinfer.whole-query"
"""Moves more bytes than the op: compared by time per byte, and never the fastest peer."""
NO_PEER = ("ropool.", "copy", MORE_WORK)
COPY_FACTOR, COPY_MICROSECONDS, LARGE = 1.06, 0.15, 512
"""An op may cost so many copies of its bytes from `LARGE` tokens up, below so much more than one.
"""
PEER_FACTOR = 1.02
"""No point may be slower than this times the fastest peer."""
CEILING, CEILING_TOKENS = 0.92, 32768
"""Share of the copy's bandwidth, and from how many tokens on."""


@dataclass(frozen=True, slots=True)
class Target:
    """Geometric mean over the tokens of peer / ours: `peer` empty means the fastest at each point,
    `heads` empty every head shape, `tokens` 0 all of them."""

    op: str
    peer: str
    factor: float
    heads: str = ""
    pool: str = ""
    norm: bool = False
    query: str = ""
    tokens: int = 0
    at_least: int = 0
    """The fewest tokens that count."""

    def covers(self, key: Case) -> bool:
        asked = (self.op, self.norm, self.pool or key.model, self.query)
        found = (key.op, key.norm, key.pool or key.model, key.query)
        return asked == found and self.heads in ("", key.heads)

    def counts(self, tokens: int) -> bool:
        return self.tokens in (0, tokens) and tokens >= self.at_least


FP8 = "float8_e4m3fn"
TARGETS = (
    Target("rope_store_kv_", "", 1.08),
    Target("rope_store_kv_", "flashinfer", 1.35, heads="32x8x128", pool=FP8, query=FP8),
    Target("rope_store_kv_", "sglang.pool", 2.5, heads="32x8x128", pool=FP8),
    Target("rope_store_kv_", "flashinfer.generated", 1.25, heads="64x8x128", norm=True),
    Target("rope_store_kv_", "sglang", 2.0, heads="32x8x128", norm=True),
    Target("rope_store_kv_", "vllm", 2.0, heads="32x8x128", norm=True),
    Target("rope_store_mla_", "vllm", 1.6),
    # By the byte, so only where the bytes decide.
    Target("rope_store_mla_", MORE_WORK, 1.3, pool=FP8, query=FP8, at_least=4096),
    Target("store_mla_", "", 1.02),
    Target("store_mla_", "triton.2025", 4.6, tokens=16384),
    Target("store_kv_", "", 1.02),
    Target("rope_", "", 1.05),
)


@dataclass(frozen=True, slots=True)
class Case:
    """All token counts of one op on one shape."""

    op: str
    heads: str
    model: str
    pool: str
    query: str
    norm: bool

    @property
    def title(self) -> str:
        pool = f", pool {self.pool}" if self.pool not in ("", self.model) else ""
        query = f", query {self.query}" if self.query else ""
        return f"`{self.op}` {self.heads} {self.model}{pool}{query}{', norm' if self.norm else ''}"


@dataclass(frozen=True, slots=True)
class Point:
    """The medians at one token count, microseconds, of right results only. One that moves more
    bytes than the op counts by its time per byte."""

    tokens: int
    times: dict[str, float]

    @property
    def ours(self) -> float | None:
        return self.times.get(OURS)

    def fastest_peer(self) -> tuple[str, float] | None:
        peers = [(name, t) for name, t in self.times.items() if not name.startswith(NO_PEER)]
        return min(peers, key=lambda peer: peer[1], default=None)

    def peer(self, name: str) -> float | None:
        """The time of a peer, or of the fastest."""
        if name:
            return self.times.get(name)
        fastest = self.fastest_peer()
        return None if fastest is None else fastest[1]


def cases(rows: Iterable[Row], serial: bool = False) -> dict[Case, list[Point]]:
    """The rows by case, tokens rising; `serial`: with the times without overlap."""
    rows = list(rows)
    moved = {(case_of(row), row.tokens): row.min_bytes for row in rows if row.provider == OURS}
    found: dict[Case, dict[int, dict[str, float]]] = {}
    for row in rows:
        times = found.setdefault(case_of(row), {}).setdefault(row.tokens, {})
        if row.p50_us is not None and row.correct:
            taken = row.serial_us if serial and row.serial_us is not None else row.p50_us
            share = moved.get((case_of(row), row.tokens), row.min_bytes) / row.min_bytes
            times[row.provider] = taken if share == 1.0 else taken * share
    return {
        case: [Point(tokens, times) for tokens, times in sorted(points.items())]
        for case, points in found.items()
    }


def case_of(row: Row) -> Case:
    queries = row.heads_q or "-"
    heads = (
        f"{queries}x{row.latent_dim}+{row.head_dim}"
        if row.latent_dim
        else f"{queries}x{row.heads_kv}x{row.head_dim}"
    )
    return Case(row.op, heads, row.dtype, row.kv_dtype, row.q_dtype, row.norm)


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def summary(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line a case, the targets, and the points that miss them; then cases and points
    without overlap of neighbouring calls."""
    by_case, serial = cases(rows), cases(rows, serial=True)
    return [
        "# In a chain of itself",
        "",
        *(*case_table(by_case), "", *target_table(by_case), "", *misses(by_case), ""),
        "# Each call after the one before has ended",
        "",
        *(*case_table(serial), "", *misses(serial)),
    ]


def case_table(by_case: dict[Case, list[Point]]) -> list[str]:
    lines = [
        "| case | geometric mean of ours / copy | / copy.pdl | largest ours / copy from "
        f"T = {LARGE} | largest ours - copy below, us | fastest peer / ours, geometric mean | "
        "smallest (T, peer) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, points in by_case.items():
        both = [
            [(p.ours, p.times[copy], p.tokens) for p in points if p.ours and copy in p.times]
            for copy in COPIES
        ]
        means = [geometric_mean([ours / copy for ours, copy, _ in pairs]) for pairs in both]
        large = max((ours / copy for ours, copy, t in both[0] if t >= LARGE), default=None)
        small = max((ours - copy for ours, copy, t in both[0] if t < LARGE), default=None)
        peers = [
            (peer[1] / p.ours, p.tokens, peer[0])
            for p in points
            if p.ours and (peer := p.fastest_peer())
        ]
        mean = geometric_mean([ratio for ratio, *_ in peers])
        worst = min(peers, default=None)
        where = "-" if worst is None else f"{worst[0]:.2f} ({worst[1]}, {worst[2]})"
        cells = [case.title, *map(number, (*means, large, small, mean)), where]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def target_table(by_case: dict[Case, list[Point]]) -> list[str]:
    lines = [
        "| aim: peer / ours | found | wanted | |",
        "| --- | --- | --- | --- |",
    ]
    for target in TARGETS:
        for case, points in by_case.items():
            if not target.covers(case):
                continue
            ratios = [
                peer / p.ours
                for p in points
                if p.ours and (peer := p.peer(target.peer)) and target.counts(p.tokens)
            ]
            mean = geometric_mean(ratios)
            if mean is not None:
                at = f" at T = {target.tokens}" if target.tokens else f", {len(ratios)} points"
                at += f" from T = {target.at_least}" if target.at_least else ""
                at += " by the byte" if target.peer == MORE_WORK else ""
                against = target.peer or "fastest peer"
                verdict = "met" if mean >= target.factor else "missed"
                cells = (f"{case.title}, {against}{at}", number(mean), number(target.factor))
                lines.append(f"| {' | '.join((*cells, verdict))} |")
    return lines


def misses(by_case: dict[Case, list[Point]]) -> list[str]:
    """How many points keep to the bounds, and which do not."""
    bounds: tuple[tuple[str, Callable[[Point], bool | None]], ...] = (
        (f"ours at most {COPY_FACTOR} of `copy` from T = {LARGE}", near_copy),
        (f"ours at most `copy` + {COPY_MICROSECONDS} us below", near_small_copy),
        (f"ours at most {PEER_FACTOR} of the fastest peer", near_peer),
        (f"{CEILING:.0%} of the copy's bandwidth from T = {CEILING_TOKENS}", near_ceiling),
    )
    lines = ["| bound | kept at | broken at |", "| --- | --- | --- |"]
    for title, bound in bounds:
        verdicts = [(case, p, bound(p)) for case, points in by_case.items() for p in points]
        judged = [(case, p, kept) for case, p, kept in verdicts if kept is not None]
        broken: dict[Case, list[str]] = {}
        for case, p, kept in judged:
            if not kept:
                broken.setdefault(case, []).append(str(p.tokens))
        where = "; ".join(f"{case.title}: {', '.join(at)}" for case, at in broken.items())
        kept_at = sum(bool(kept) for *_, kept in judged)
        lines.append(f"| {title} | {kept_at} of {len(judged)} points | {where or 'none'} |")
    return lines


def near_copy(p: Point) -> bool | None:
    if p.ours is None or "copy" not in p.times or p.tokens < LARGE:
        return None
    return p.ours <= COPY_FACTOR * p.times["copy"]


def near_small_copy(p: Point) -> bool | None:
    if p.ours is None or "copy" not in p.times or p.tokens >= LARGE:
        return None
    return p.ours <= p.times["copy"] + COPY_MICROSECONDS


def near_peer(p: Point) -> bool | None:
    peer = p.fastest_peer()
    return None if p.ours is None or peer is None else p.ours <= PEER_FACTOR * peer[1]


def near_ceiling(p: Point) -> bool | None:
    if p.ours is None or "copy" not in p.times or p.tokens < CEILING_TOKENS:
        return None
    return p.times["copy"] >= CEILING * p.ours


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def read(path: Path) -> list[Row]:
    """The rows of a `results.csv`."""
    with path.open(newline="") as file:
        return [row_of(record) for record in csv.DictReader(file)]


def row_of(record: dict[str, str]) -> Row:
    """A row from its cells: what is empty is missing, and a column that is not there has its
    default."""
    values: dict[str, object] = {}
    for field in fields(Row):
        cell = record.get(field.name)
        if cell is None:
            continue
        kind = str(field.type).removesuffix(" | None")
        if kind == "bool":
            values[field.name] = cell == "true" if cell else None
        elif kind in ("int", "float"):
            values[field.name] = (int if kind == "int" else float)(cell) if cell else None
        else:
            values[field.name] = cell
    return Row(**values)  # type: ignore[arg-type]
