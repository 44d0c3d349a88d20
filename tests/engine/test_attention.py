"""Attention of a group against its formula in float64, with sinks and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ropool.engine.attention import attend

HEADS_Q, HEADS_KV, DIM, PAGES = 6, 2, 24, 48
SCALE = 0.3
# One rounding, of the result; in float32 sums in another order beside it.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-5},
}
# Requests and queries: decoding alone and together, a first chunk, a later one.
GROUPS = {"one token": (1, 1), "decoding": (4, 1), "first chunk": (1, 33), "chunk": (1, 7)}


def formula(
    rows: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """`rows` `[N, queries, Hq, D]`, `hidden` `[N, queries, keys]`: those that are not seen."""
    k, v = (x.double().repeat_interleave(HEADS_Q // HEADS_KV, dim=1) for x in (k, v))
    scores = torch.einsum("nqhd,nhkd->nhqk", rows.double(), k) * scale
    powers = scores.masked_fill(hidden[:, None], float("-inf")).exp()
    total = powers.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return torch.einsum("nhqk,nhkd->nqhd", powers / total, v)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "dtype, with_sinks",
    # SDPA's own rounding in 16 bits is not ours to test.
    [(torch.float32, False), *((dtype, True) for dtype in TOLERANCE)],
    ids=str,
)
def test_attention(group: str, dtype: torch.dtype, with_sinks: bool) -> None:
    requests, queries = GROUPS[group]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    # Views of wider rows, as a packed projection and pages are.
    rows = normal(requests * queries, HEADS_Q + 3, DIM)[:, :HEADS_Q]
    k, v = (normal(requests, PAGES, HEADS_KV, DIM).transpose(1, 2) for _ in "kv")
    sinks = (2 * normal(HEADS_Q)) if with_sinks else None
    first = torch.zeros(1, 1) if group == "first chunk" else torch.tensor([[9], [40], [21], [17]])
    query = first[:requests] + torch.arange(queries)
    hidden = torch.arange(PAGES) > query[..., None]
    mask = None
    if group != "first chunk":
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None]
    expected = formula(rows.unflatten(0, (requests, queries)), k, v, hidden, SCALE, sinks).flatten(
        0, 1
    )
    got = attend(rows, k, v, mask, SCALE, sinks)
    assert got.dtype == dtype and got.shape == rows.shape
    torch.testing.assert_close(got.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("sink", [-200.0, 200.0])
def test_a_large_sink_takes_all_and_a_small_one_nothing(sink: float) -> None:
    rows, k = torch.randn(3, 2, 8), torch.randn(1, 2, 16, 8)
    sinks = torch.full((2,), sink)
    got = attend(rows, k, k, None, 1.0, sinks)
    without = attend(rows, k, k, None, 1.0, None)
    torch.testing.assert_close(got, without if sink < 0 else torch.zeros_like(got))
