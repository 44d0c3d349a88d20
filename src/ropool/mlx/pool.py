"""The KV pool in MLX arrays, behind the page tables of the PyTorch engine."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ropool.engine.cache import PAGE_SIZE, KVCache
from ropool.engine.pools import Pool
from ropool.engine.scales import CacheScales
from ropool.engine.spec import KVRow
from ropool.errors import RopoolError


class MlxPool:
    """K and V arrays of `layers` layers, each `[P, B, Hk, D]`, zeroed.

    An update gives a new array; whoever makes one puts it into `k` or `v` in place of the old one,
    which MLX then updates in place.
    """

    def __init__(self, *, layers: int, pages: int, row: KVRow, dtype: mx.Dtype) -> None:
        self.pages, self.page_size = pages, PAGE_SIZE
        shape = (pages, PAGE_SIZE, row.heads, row.head_dim)
        self.k = [mx.zeros(shape, dtype) for _ in range(layers)]
        self.v = [mx.zeros(shape, dtype) for _ in range(layers)]
        self._written = [False] * pages
        mx.eval(self.k, self.v)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take."""
        return sum(array.nbytes for array in (*self.k, *self.v))

    def clear(self, pages: Sequence[int]) -> None:
        """Zero these pages in every layer, those that were never handed out excepted: they are
        zero."""
        used = [page for page in pages if self._written[page]]
        for page in pages:
            self._written[page] = True
        if used:
            index = mx.array(used)
            for array in (*self.k, *self.v):
                array[index] = 0


class MlxKVCache(KVCache):
    """The page tables of `KVCache` over MLX arrays. `mlx_pools` holds those of layers that see
    every token (`False`) and of those with a sliding window (`True`); `places` says for each layer
    which of the two it uses, and its place there."""

    def __init__(self, *args: object, mlx_dtype: mx.Dtype, **sizes: object) -> None:
        self._mlx_dtype = mlx_dtype
        super().__init__(*args, **sizes)  # type: ignore[arg-type]

    def _new_pool(self, layers: int, pages: int) -> Pool:
        row = self.spec.row
        assert isinstance(row, KVRow)
        # It has what the page tables ask of a pool.
        return MlxPool(  # type: ignore[return-value]
            layers=layers, pages=pages, row=row, dtype=self._mlx_dtype
        )

    def _add_layers(self) -> None:
        seen = {False: 0, True: 0}
        self.places: list[tuple[bool, int]] = []
        for window in self.spec.windows:
            kind = window is not None
            self.places.append((kind, seen[kind]))
            seen[kind] += 1

    def set_scales(self, scales: CacheScales) -> None:
        """Raises `RopoolError`: no pool of these is fp8."""
        raise RopoolError("cache scales are for an fp8 pool, which the MLX engine does not have")

    def mlx_pool(self, windowed: bool) -> MlxPool:
        """The pool of one kind of layer."""
        pool = self.pools[windowed]
        assert isinstance(pool, MlxPool)
        return pool
