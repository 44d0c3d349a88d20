"""What a repeated call is looked up by: the compiled reader sees what attributes tell apart."""

from __future__ import annotations

import itertools

import pytest
import torch

import ropool
from ropool.dispatch import cache
from ropool.ops import _op, _signature

TENSORS = [
    torch.zeros(4, 2, 8),
    torch.zeros(4, 2, 8, dtype=torch.float16),
    torch.zeros(4, 2, 8, dtype=torch.bfloat16),
    torch.zeros(4, 2, 8, dtype=torch.int32),
    torch.zeros(4, 2, 8, dtype=torch.uint8),
    torch.zeros(4, 2, 8, dtype=torch.float8_e4m3fn),
    torch.zeros(4, 2, 8, dtype=torch.float8_e5m2),
    torch.zeros(4, 2, 8, dtype=torch.float8_e4m3fnuz),
    torch.zeros(4, 8, 2).transpose(1, 2),
    torch.zeros(4, 2, 16)[..., :8],
    torch.zeros(4, 16),
    torch.zeros(64),
    torch.zeros(()),
    torch.zeros(0, 2, 8),
]


def test_equal_metadata_and_nothing_else_gives_an_equal_signature() -> None:
    if _signature.metadata is _signature.described:
        pytest.skip("the compiled reader is not installed")
    lists = [(t,) for t in TENSORS] + [(t, None) for t in TENSORS] + [(None, t) for t in TENSORS]
    lists += [(TENSORS[0], TENSORS[1]), (TENSORS[1], TENSORS[0]), (None,), (None, None)]
    for first, second in itertools.product(lists, repeat=2):
        same = _signature.described(first) == _signature.described(second)
        assert (_signature.metadata(first) == _signature.metadata(second)) == same
    again = tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in TENSORS)
    assert _signature.metadata(again) == _signature.metadata(tuple(TENSORS))
    parameter = torch.nn.Parameter(torch.zeros(4, 2, 8))
    assert _signature.metadata((parameter,)) == _signature.metadata((TENSORS[0],))


@pytest.mark.parametrize("reader", ["compiled", "attributes"])
def test_calls_are_looked_up_and_mistakes_named(
    reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "attributes":
        monkeypatch.setattr(_op, "metadata", _signature.described)
    cache.clear()
    table, positions = torch.ones(4, 8), torch.zeros(3, dtype=torch.int64)
    for _ in range(3):
        ropool.rope_(torch.ones(3, 2, 8), None, table, positions)
    assert len(cache.launches) == 1
    ropool.rope_(torch.ones(3, 2, 16)[..., :8], None, table, positions)
    assert len(cache.launches) == 2
    for wrong in (1.0, "q", [torch.ones(3, 2, 8)], None):
        with pytest.raises(TypeError, match=r"ropool.rope_: q must be a torch.Tensor, got"):
            ropool.rope_(wrong, None, table, positions)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match=r"ropool.rope_: q "):
        ropool.rope_(torch.ones(3, 2, 8).to_sparse(), None, table, positions)
    with pytest.raises(ValueError, match=r"ropool.rope_: positions is on meta"):
        ropool.rope_(torch.ones(3, 2, 8), None, table, positions.to("meta"))
    assert len(cache.launches) == 2
    cache.clear()


def test_a_tensor_that_needs_a_gradient_is_refused_after_a_call_that_did_not() -> None:
    table, positions = torch.ones(4, 8), torch.zeros(3, dtype=torch.int64)
    q = torch.ones(3, 2, 8)
    ropool.rope_(q, None, table, positions)
    needing = torch.ones(3, 2, 8, requires_grad=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"ropool.rope_: q requires grad"):
            ropool.rope_(needing, None, table, positions)
    with torch.no_grad():
        ropool.rope_(needing, None, table, positions)
    assert bool((needing != 1).any())
