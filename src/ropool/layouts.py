"""Page layouts of the KV pool, reduced to one address formula that every kernel can use."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple


class KVLayout(enum.StrEnum):
    """How a KV pool arranges pages `P`, rows of a page `B`, heads `Hk` and dims `D`.

    `x` is read off the tensor: the size of its last dimension (16 bytes' worth of elements in the
    engines that use these layouts).
    """

    NHD = "NHD"
    """K and V `[P, B, Hk, D]` (flash layout)."""
    HND = "HND"
    """K and V `[P, Hk, B, D]`."""
    SLOTS = "slots"
    """K and V `[S, Hk, D]`: NHD with one row a page."""
    X_PACKED = "x_packed"
    """K `[P, Hk, D/x, B, x]`, V `[P, Hk, D, B]`."""
    SHUFFLED = "shuffled"
    """K `[P, Hk, D/x, B, x]`, V `[P, Hk, B/x, D, x]`."""


class PlaneView(NamedTuple):
    """Where element `(slot, head, dim)` of one pool tensor stands; strides in elements.

        page, row = divmod(slot, page_size)
        page * page_stride + head * head_stride
          + row // row_group * row_group_stride + row % row_group * row_stride
          + dim // dim_group * dim_group_stride + dim % dim_group * dim_stride

    Offsets pass 2**31 in real pools: kernels compute them in 64 bits.
    """

    pages: int
    page_size: int
    heads: int
    head_dim: int
    row_group: int
    dim_group: int
    page_stride: int
    head_stride: int
    row_group_stride: int
    row_stride: int
    dim_group_stride: int
    dim_stride: int


_DIMS = {
    KVLayout.NHD: ("[P, B, Hk, D]", "[P, B, Hk, D]"),
    KVLayout.HND: ("[P, Hk, B, D]", "[P, Hk, B, D]"),
    KVLayout.SLOTS: ("[S, Hk, D]", "[S, Hk, D]"),
    KVLayout.X_PACKED: ("[P, Hk, D/x, B, x]", "[P, Hk, D, B]"),
    KVLayout.SHUFFLED: ("[P, Hk, D/x, B, x]", "[P, Hk, B/x, D, x]"),
}


def describe_dims(layout: KVLayout, part: str) -> str:
    """The dimensions of pool tensor `part` (`k` or `v`) in `layout`, as written in `KVLayout`."""
    return _DIMS[layout][part == "v"]


def plane_view(
    layout: KVLayout, part: str, shape: Sequence[int], stride: Sequence[int]
) -> PlaneView:
    """Reduce a pool tensor of `layout` to a `PlaneView`. `part` is `k` or `v`.

    Raises `ValueError` when the rank does not fit the layout.
    """
    dims = describe_dims(layout, part)
    if len(shape) != dims.count(",") + 1:
        raise ValueError(f"expected {dims}, got shape {tuple(shape)}")
    if layout is KVLayout.SLOTS:
        (s, h, d), (s_s, s_h, s_d) = shape, stride
        return PlaneView(s, 1, h, d, 1, max(d, 1), s_s, s_h, 0, 0, 0, s_d)
    if layout is KVLayout.NHD:
        (p, b, h, d), (s_p, s_b, s_h, s_d) = shape, stride
        return PlaneView(p, b, h, d, 1, max(d, 1), s_p, s_h, s_b, 0, 0, s_d)
    if layout is KVLayout.HND:
        (p, h, b, d), (s_p, s_h, s_b, s_d) = shape, stride
        return PlaneView(p, b, h, d, 1, max(d, 1), s_p, s_h, s_b, 0, 0, s_d)
    if part == "k":
        (p, h, dx, b, x), (s_p, s_h, s_dx, s_b, s_x) = shape, stride
        return PlaneView(p, b, h, dx * x, 1, max(x, 1), s_p, s_h, s_b, 0, s_dx, s_x)
    if layout is KVLayout.X_PACKED:
        (p, h, d, b), (s_p, s_h, s_d, s_b) = shape, stride
        return PlaneView(p, b, h, d, max(b, 1), 1, s_p, s_h, 0, s_b, s_d, 0)
    (p, h, bx, d, x), (s_p, s_h, s_bx, s_d, s_x) = shape, stride
    return PlaneView(p, bx * x, h, d, max(x, 1), 1, s_p, s_h, s_bx, s_x, s_d, 0)
