"""What one forward pass of a ragged batch is told: built once a step on the host, so that no layer
loops over requests or waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ropool.engine.cache import PAGE_SIZE
from ropool.engine.step import Member, Span, group_spans
from ropool.mlx.aot import MlxAOTKernelContext
from ropool.mlx.pool import MlxKVCache


class AttentionGroup(NamedTuple):
    """Consecutive rows of a step whose attention is one SDPA call: `N` requests with as many
    queries each, over `M` pages each."""

    first: int
    last: int
    requests: int
    pages: mx.array | slice
    """`[N * M]`; a slice when the pages of the one request stand side by side."""
    mask: mx.array | str | None
    """`[N, 1, queries, M * B]` bool, true where a key is seen; `"causal"`: from the first token on.
    """
    keys: int
    """Rows of the gathered pages that are read: `M * B`, or fewer."""


@dataclass(frozen=True, eq=False)
class BatchedDecodeContext:
    """One forward pass over `T` tokens of any number of requests."""

    tokens: mx.array
    """`[1, T]`: to the model a batch of one."""
    positions: mx.array
    """`[T]` int32."""
    slots: dict[bool, mx.array]
    """`[T]` int32 slots of the pool of layers that see every token (`False`), and of the one with a
    sliding window (`True`)."""
    sample_rows: mx.array
    groups: dict[bool, list[AttentionGroup]]
    kernels: MlxAOTKernelContext
    cache: MlxKVCache


class LayerContext:
    """Stands where `mlx-lm` has the cache of a layer, and leads to the step that runs."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.step: BatchedDecodeContext | None = None

    def make_mask(self, *_: Any, **__: Any) -> None:
        """No mask of the whole batch: each group of requests has its own."""
        return


def build_context(
    spans: Sequence[Span], cache: MlxKVCache, kernels: MlxAOTKernelContext
) -> BatchedDecodeContext:
    """The step that computes `spans`, whose slots are reserved; `sample_rows` are in their
    order."""
    cache.clear_fresh()
    tokens: list[int] = []
    positions: list[int] = []
    slots: dict[bool, list[int]] = {kind: [] for kind in cache.pools}
    sample_rows: list[int] = []
    for span in spans:
        tokens += span.tokens
        positions += range(span.start, span.end)
        for windowed, own in slots.items():
            pages = span.table.pages
            if windowed and cache.window_map is not None:
                pages = [cache.window_map.window_page(page) for page in pages]
            own += [
                pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE
                for p in range(span.start, span.end)
            ]
        if span.sample:
            sample_rows.append(len(tokens) - 1)
    groups: dict[bool, list[AttentionGroup]] = {}
    for windowed in cache.pools:
        row, groups[windowed] = 0, []
        for members in group_spans(spans, cache, windowed):
            groups[windowed].append(_group(row, members, cache, windowed))
            row = groups[windowed][-1].last
    return BatchedDecodeContext(
        tokens=mx.array(tokens)[None],
        positions=mx.array(positions),
        slots={kind: mx.array(own) for kind, own in slots.items()},
        sample_rows=mx.array(sample_rows, mx.int32),
        groups=groups,
        kernels=kernels,
        cache=cache,
    )


def _group(
    row: int, members: Sequence[Member], cache: MlxKVCache, windowed: bool
) -> AttentionGroup:
    requests, queries = len(members), len(members[0][0].tokens)
    last = row + queries * requests
    most = max(len(pages) for _, pages, _ in members)
    # Padding reads a request's own first page, under the mask: nothing of another request gets in.
    padded = [pages + pages[:1] * (most - len(pages)) for _, pages, _ in members]
    first = padded[0][0]
    pages: mx.array | slice
    if requests == 1 and padded[0] == list(range(first, first + most)):
        pages = slice(first, first + most)
    else:
        pages = mx.array(padded).flatten()
    span, _, base = members[0]
    # Where every key up to the query is seen, no mask is needed: the rows behind it are cut off.
    if requests == 1 and (not windowed or span.end <= (cache.window or 0)):
        if span.start == 0 and queries > 1:
            return AttentionGroup(row, last, 1, pages, "causal", queries)
        if queries == 1 and base == 0:
            return AttentionGroup(row, last, 1, pages, None, span.end)
    starts = np.array([span.start for span, _, _ in members])
    bases = np.array([base for _, _, base in members])
    query = (starts[:, None] + np.arange(queries))[:, :, None]
    key = (bases[:, None] + np.arange(most * PAGE_SIZE))[:, None, :]
    seen = key <= query
    if windowed and cache.window is not None:
        seen &= key > query - cache.window
    return AttentionGroup(row, last, requests, pages, mx.array(seen[:, None]), most * PAGE_SIZE)
