"""What one forward pass is told: its tokens, where their K and V go, and what attention reads.

Built once a step on the host, so that a layer neither loops over requests nor waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ropool.engine.cache import PAGE_SIZE, KVCache, PageTable
from ropool.engine.pools import LatentCache, LayerCache, gather_buffers


class Span(NamedTuple):
    """Tokens `start` to `end` of one request, to be computed in this step."""

    tokens: Sequence[int]
    start: int
    table: PageTable
    sample: bool
    """Whether the logits after the last token are wanted."""
    positions: Sequence[Sequence[int]]
    """Rows of the rotary table: one list, or three with M-RoPE."""
    embeddings: Sequence[tuple[int, Tensor]]
    """What stands in place of the embeddings of tokens: number of the first one in this span, and
    `[m, hidden]`."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class AttentionGroup(NamedTuple):
    """Consecutive rows of a step whose attention is one SDPA call: `N` requests with as many
    queries each."""

    first: int
    last: int
    requests: int
    pages: Tensor
    """`[N * M]` int64: `M` pages a request."""
    mask: Tensor | None
    """`[N, 1, queries, M * B]`, 0 or -inf, in the dtype of the queries. `None`: causal, from the
    first token on."""


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass over `T` tokens of any number of requests; int64 metadata on the model's
    device."""

    tokens: Tensor
    positions: Tensor
    """`[T]`, or `[3, T]` with M-RoPE: rows of the rotary table."""
    slots: Tensor
    """`[T]`, slots of the full pool."""
    sample_rows: Tensor
    embeddings: list[tuple[int, Tensor]]
    """Rows that stand in place of the embeddings of tokens: number of the first token, and `[m,
    hidden]`."""
    layers: list[LayerCache]
    latent_layers: list[LatentCache]
    """Of an MLA model, whose `layers` are none."""
    groups: dict[bool, list[AttentionGroup]]
    """For layers that see every token (`False`) and for those with a sliding window (`True`)."""
    workspace: tuple[Tensor, ...]
    """What a group reads is gathered here: K and V `[pages, B, Hk, D]`, or latent rows `[pages, B,
    L + R]`. Every layer uses the same memory."""


def build_step(spans: Sequence[Span], cache: KVCache) -> Step:
    """The step that computes `spans`, whose slots are reserved; `sample_rows` are in their order.

    Neighbours that decode at a like length share an SDPA call.
    """
    cache.clear_fresh()
    tokens: list[int] = []
    positions: list[list[int]] = [[] for _ in spans[0].positions]
    slots: list[int] = []
    sample_rows: list[int] = []
    embeddings: list[tuple[int, Tensor]] = []
    for span in spans:
        embeddings += [(len(tokens) + first, rows) for first, rows in span.embeddings]
        tokens += span.tokens
        for stream, own in zip(positions, span.positions, strict=True):
            stream += own
        pages = span.table.pages
        slots += [
            pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(span.start, span.end)
        ]
        if span.sample:
            sample_rows.append(len(tokens) - 1)
    groups = {windowed: _groups(spans, cache, windowed) for windowed in cache.pools}
    most = max(group.pages.numel() for kind in groups.values() for group in kind)
    device = cache.spec.device
    return Step(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions if len(positions) > 1 else positions[0], device=device),
        slots=torch.tensor(slots, device=device),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
        embeddings=embeddings,
        layers=cache.layers,
        latent_layers=cache.latent_layers,
        groups=groups,
        workspace=gather_buffers(cache.spec, most, PAGE_SIZE),
    )


Member = tuple[Span, list[int], int]
"""A span, the pages that its attention reads, and the position of their first row."""


def group_spans(spans: Sequence[Span], cache: KVCache, windowed: bool) -> list[list[Member]]:
    """Neighbours whose attention is one SDPA call: those that decode at a like length; every longer
    span is alone."""
    groups: list[list[Member]] = []
    for span in spans:
        pages, base = cache.readable(span.table, span.end, windowed)
        first = groups[-1][0] if groups else None
        # A request joins while at most half of what is gathered for it is padding.
        joins = (
            first is not None
            and len(span.tokens) == len(first[0].tokens) == 1
            and 2 * min(len(pages), len(first[1])) >= max(len(pages), len(first[1]))
        )
        if not joins:
            groups.append([])
        groups[-1].append((span, pages, base))
    return groups


def _groups(spans: Sequence[Span], cache: KVCache, windowed: bool) -> list[AttentionGroup]:
    groups: list[AttentionGroup] = []
    row = 0
    for members in group_spans(spans, cache, windowed):
        groups.append(_group(row, members, cache, windowed))
        row = groups[-1].last
    return groups


def _group(row: int, members: Sequence[Member], cache: KVCache, windowed: bool) -> AttentionGroup:
    spec = cache.spec
    queries = len(members[0][0].tokens)
    last = row + queries * len(members)
    most = max(len(pages) for _, pages, _ in members)
    # Padding reads a request's own first page, under the mask: nothing of another request, not even
    # its NaN, gets in.
    padded = [pages + pages[:1] * (most - len(pages)) for _, pages, _ in members]
    table = torch.tensor(padded, device=spec.device)
    if (
        queries > 1
        and members[0][0].start == 0
        and (not windowed or queries <= (cache.window or 0))
    ):
        return AttentionGroup(row, last, 1, table.flatten(), None)
    first_query = torch.tensor([span.start for span, _, _ in members], device=spec.device)
    first_key = torch.tensor([base for _, _, base in members], device=spec.device)
    query = (first_query[:, None] + torch.arange(queries, device=spec.device))[:, :, None]
    key = (first_key[:, None] + torch.arange(most * PAGE_SIZE, device=spec.device))[:, None, :]
    hidden = key > query
    if windowed and cache.window is not None:
        hidden |= key <= query - cache.window
    mask = torch.zeros(hidden.shape, dtype=spec.dtype, device=spec.device)
    mask.masked_fill_(hidden, float("-inf"))
    return AttentionGroup(row, last, len(members), table.flatten(), mask[:, None])
