"""`plane_view`: its address formula finds the element that the layout's own indexing finds."""

from __future__ import annotations

import pytest
import torch

from ropool.layouts import KVLayout, PlaneView, plane_view

PAGES, ROWS, HEADS, DIMS, X = 3, 8, 2, 12, 4


def indexed(layout: KVLayout, part: str) -> tuple[tuple[int, ...], object]:
    """The shape of a pool tensor and how its layout indexes `(page, row, head, dim)`."""
    if layout is KVLayout.SLOTS:
        return (PAGES * ROWS, HEADS, DIMS), lambda p, r, h, d: (p * ROWS + r, h, d)
    if layout is KVLayout.NHD:
        return (PAGES, ROWS, HEADS, DIMS), lambda p, r, h, d: (p, r, h, d)
    if layout is KVLayout.HND:
        return (PAGES, HEADS, ROWS, DIMS), lambda p, r, h, d: (p, h, r, d)
    if part == "k":
        return (PAGES, HEADS, DIMS // X, ROWS, X), lambda p, r, h, d: (p, h, d // X, r, d % X)
    if layout is KVLayout.X_PACKED:
        return (PAGES, HEADS, DIMS, ROWS), lambda p, r, h, d: (p, h, d, r)
    return (PAGES, HEADS, ROWS // X, DIMS, X), lambda p, r, h, d: (p, h, r // X, d, r % X)


def address(view: PlaneView, slot: int, head: int, dim: int) -> int:
    page, row = divmod(slot, view.page_size)
    return (
        page * view.page_stride
        + head * view.head_stride
        + row // view.row_group * view.row_group_stride
        + row % view.row_group * view.row_stride
        + dim // view.dim_group * view.dim_group_stride
        + dim % view.dim_group * view.dim_stride
    )


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("layout", KVLayout)
def test_addresses(layout: KVLayout, part: str) -> None:
    shape, index = indexed(layout, part)
    # A view into a larger tensor, so that strides are not those of the shape.
    pool = torch.arange(2 * torch.Size(shape).numel()).view(shape[0], 2, *shape[1:])[:, 1]
    flat = pool.as_strided((pool.untyped_storage().nbytes() // 8 - pool.storage_offset(),), (1,))
    view = plane_view(layout, part, pool.shape, pool.stride())
    assert (view.pages * view.page_size, view.heads, view.head_dim) == (PAGES * ROWS, HEADS, DIMS)
    for slot in range(PAGES * ROWS):
        for head in range(HEADS):
            for dim in range(DIMS):
                expected = pool[index(slot // ROWS, slot % ROWS, head, dim)]
                assert flat[address(view, slot, head, dim)] == expected


def test_a_wrong_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[P, B, Hk, D\], got shape \(2, 3\)"):
        plane_view(KVLayout.NHD, "k", (2, 3), (3, 1))
