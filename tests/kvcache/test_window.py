"""The window map: which slots stand behind which, and that pages come back."""

from __future__ import annotations

import pytest
import torch

from ropool import store_kv_
from ropool.kvcache import MHAPool, PoolExhaustedError, WindowMap


def test_backed_pages_are_mapped_and_released_ones_are_not() -> None:
    window = WindowMap(full_pages=6, window_pages=2, page_size=4)
    assert window.slot_map.tolist() == [-1] * 24
    assert window.back([5, 2]) == [0, 1]
    expected = torch.full((6, 4), -1)
    expected[5] = torch.arange(4)
    expected[2] = torch.arange(4, 8)
    assert window.slot_map.tolist() == expected.flatten().tolist()
    assert (window.window_page(5), window.window_page(2), window.window_page(0)) == (0, 1, -1)

    window.release([5, 0])
    expected[5] = -1
    assert window.slot_map.tolist() == expected.flatten().tolist()
    assert window.back([0]) == [0]
    window.release([0, 2])
    window.allocator.check_no_leak()
    assert window.slot_map.tolist() == [-1] * 24


def test_a_full_window_pool_changes_nothing() -> None:
    window = WindowMap(full_pages=6, window_pages=2, page_size=4)
    window.back([1])
    before = window.slot_map.clone()
    with pytest.raises(PoolExhaustedError, match="2 pages asked for, 1 of 2 are free"):
        window.back([2, 3])
    assert torch.equal(window.slot_map, before) and window.window_page(2) == -1
    with pytest.raises(ValueError, match="page 1 is backed already"):
        window.back([1])


def test_an_op_stores_through_the_map() -> None:
    window = WindowMap(full_pages=4, window_pages=2, page_size=4)
    pool = MHAPool(layers=1, pages=2, page_size=4, heads=1, head_dim=8, dtype=torch.float32)
    window.back([3])
    x = torch.ones(3, 1, 8)
    slots = torch.tensor([13, 2, -1])  # backed by slot 1, not backed, padding
    store_kv_(x, x, pool.k(0), pool.v(0), slots, window_slot_map=window.slot_map)
    assert pool.k(0).view(8, 8).any(-1).nonzero().flatten().tolist() == [1]
