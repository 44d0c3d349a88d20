"""The KV pool of ordinary attention (multi-head, grouped-query): tensors in one of the page
layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ropool.layouts import KVLayout

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
PACK_BYTES = 16
"""Bytes of the innermost dimension of the packed layouts: one vector load."""


class MHAPool:
    """K and V tensors of `layers` layers, zeroed, each layer of `P` pages with `B` tokens in
    `layout`.

    Zeroed, and pages are zeroed again by `clear`, because attention reads whole pages under a mask:
    a NaN that an earlier request left in a row would survive its multiplication by zero.

    Args:
        dtype: the model's dtype, or float8_e4m3fn / float8_e5m2.
        v_head_dim: width of a value head; `head_dim` by default.
        k_scales, v_scales: `[layers]` or `[layers, Hk]`, float32, only for an fp8 pool: stored
            values are divided by them. 1 by default.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page_size: int,
        heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        dtype: torch.dtype,
        layout: KVLayout = KVLayout.NHD,
        device: torch.device | str = "cpu",
        k_scales: Tensor | None = None,
        v_scales: Tensor | None = None,
    ) -> None:
        self.layers, self.pages, self.page_size = layers, pages, page_size
        self.layout = KVLayout(layout)
        self.dtype = dtype
        self.is_fp8 = dtype in FP8_DTYPES
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        k_shape, v_shape = _shapes(
            self.layout, pages, page_size, heads, head_dim, v_head_dim, dtype
        )
        self._k = torch.zeros((layers, *k_shape), dtype=dtype, device=device)
        self._v = torch.zeros((layers, *v_shape), dtype=dtype, device=device)
        self._k_scales = self._scales("k_scales", k_scales, heads)
        self._v_scales = self._scales("v_scales", v_scales, heads)

    def k(self, layer: int) -> Tensor:
        """The K tensor of a layer, a view in the pool's layout."""
        return self._k[layer]

    def v(self, layer: int) -> Tensor:
        """The V tensor of a layer, a view in the pool's layout."""
        return self._v[layer]

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """`(k_scale, v_scale)` of a layer, each `[]` or `[Hk]`; `None`: 1."""
        k, v = self._k_scales, self._v_scales
        return None if k is None else k[layer], None if v is None else v[layer]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return self._k.nbytes + self._v.nbytes

    def clear(self, pages: Sequence[int]) -> None:
        """Zero these pages in every layer."""
        index = torch.tensor(pages, device=self._k.device)
        for tensor in (self._k, self._v):
            # fp8 has no index_fill; its zero is a zero byte.
            (tensor.view(torch.uint8) if self.is_fp8 else tensor).index_fill_(1, index, 0)

    def _scales(self, name: str, scales: Tensor | None, heads: int) -> Tensor | None:
        if scales is None:
            return None
        if not self.is_fp8:
            raise ValueError(
                f"MHAPool: {name} given, but the pool's dtype is {self.dtype}; that needs fp8"
            )
        if scales.dtype != torch.float32 or scales.shape not in (
            (self.layers,),
            (self.layers, heads),
        ):
            raise ValueError(
                f"MHAPool: {name} is {scales.dtype} {tuple(scales.shape)}, "
                f"must be float32 [{self.layers}] or [{self.layers}, {heads}]"
            )
        return scales.to(self._k.device)


def _shapes(
    layout: KVLayout, p: int, b: int, h: int, d: int, dv: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the K and V tensor of one layer."""
    if layout is KVLayout.NHD:
        return (p, b, h, d), (p, b, h, dv)
    if layout is KVLayout.HND:
        return (p, h, b, d), (p, h, b, dv)
    if layout is KVLayout.SLOTS:
        if b != 1:
            raise ValueError(f"MHAPool: layout slots has pages of 1 token, got page_size={b}")
        return (p, h, d), (p, h, dv)
    x = PACK_BYTES // dtype.itemsize
    if d % x or (layout is KVLayout.SHUFFLED and b % x):
        raise ValueError(
            f"MHAPool: layout {layout.value} packs {x} elements of {dtype}; head_dim={d} and, if "
            f"shuffled, page_size={b} must be multiples of that"
        )
    k_shape = (p, h, d // x, b, x)
    return k_shape, (p, h, dv, b) if layout is KVLayout.X_PACKED else (p, h, b // x, dv, x)
