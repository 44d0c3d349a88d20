"""The allocator against a plain set of pages, and each of its errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropool.kvcache import PoolExhaustedError, SlotAllocator


@given(
    pages=st.integers(1, 12),
    page_size=st.integers(1, 16),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60),
)
def test_behaves_as_a_set_of_pages(
    pages: int, page_size: int, moves: list[tuple[bool, int]]
) -> None:
    allocator = SlotAllocator(pages, page_size)
    held: list[int] = []
    peak = 0
    for take, count in moves:
        if take and count > pages - len(held):
            with pytest.raises(PoolExhaustedError, match=f"{count} pages asked for"):
                allocator.allocate(count)
        elif take:
            got = allocator.allocate(count)
            assert len(got) == count
            assert not set(got) & set(held)
            held += got
        else:
            back, held = held[:count], held[count:]
            allocator.free(back)
        peak = max(peak, len(held))
        assert set(held) <= set(range(pages))
        assert allocator.free_pages == pages - len(held)
        assert allocator.used_slots == len(held) * page_size
        assert allocator.peak_used_slots == peak * page_size
    allocator.free(held)
    allocator.check_no_leak()
    assert sorted(allocator.allocate(pages)) == list(range(pages))


def test_a_page_freed_twice_is_an_error() -> None:
    allocator = SlotAllocator(4, 16)
    page = allocator.allocate(1)
    allocator.free(page)
    with pytest.raises(ValueError, match=r"page 0 is free already \(double free\)"):
        allocator.free(page)
    allocator.allocate(1)
    with pytest.raises(ValueError, match="page 3 is free already"):
        allocator.free([3])


@pytest.mark.parametrize("page", [-1, 4])
def test_a_page_that_does_not_exist_is_an_error(page: int) -> None:
    with pytest.raises(ValueError, match=f"page {page} is outside of the pool's 4 pages"):
        SlotAllocator(4).free([page])


def test_a_leak_is_named() -> None:
    allocator = SlotAllocator(20)
    pages = allocator.allocate(12)
    allocator.free(pages[:2])
    with pytest.raises(RuntimeError, match=r"10 of 20 pages leaked: 2, 3, .*, 9, \.\.\."):
        allocator.check_no_leak()


def test_a_pool_of_any_size_costs_nothing_at_first() -> None:
    allocator = SlotAllocator(10**30, 16)
    assert allocator.allocate(3) == [0, 1, 2]
    allocator.free([1])
    assert allocator.allocate(2) == [1, 3] and allocator.free_pages == 10**30 - 4


def test_pages_for_rounds_up() -> None:
    allocator = SlotAllocator(8, 16)
    assert [allocator.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert allocator.slots == 128


@pytest.mark.parametrize("pages, page_size", [(0, 1), (1, 0), (-1, 16)])
def test_an_empty_pool_is_refused(pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        SlotAllocator(pages, page_size)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        SlotAllocator(4).allocate(-1)
