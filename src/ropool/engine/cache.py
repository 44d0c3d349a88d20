"""The KV cache of one model: the pool that each layer uses, and the pages that each request
holds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ropool.engine.pools import (
    CacheDtype,
    LatentCache,
    LayerCache,
    Pool,
    new_pool,
    pool_dtype,
    row_bytes,
)
from ropool.engine.scales import CacheScales
from ropool.engine.spec import ModelSpec
from ropool.errors import RopoolError
from ropool.kvcache import MHAPool, SlotAllocator, WindowMap

PAGE_SIZE = 16


@dataclass
class PageTable:
    """The pages of one request, in the order of its tokens."""

    pages: list[int] = field(default_factory=list)
    first_backed: int = 0
    """Index of the first page that is still inside the sliding window."""


class KVCache:
    """Owns the pools of a model and gives their pages to requests.

    `layers` are those of a model with K and V heads, `latent_layers` those of an MLA model; the
    other list is empty.

    Layers with a sliding window share a smaller pool with room for `max_requests` windows and a
    step's chunks; one request always fits.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        pool_tokens: int,
        max_requests: int,
        max_batch_tokens: int,
        dtype: CacheDtype | None = None,
    ) -> None:
        if not isinstance(pool_tokens, int) or pool_tokens < 1:
            raise RopoolError(f"pool of {pool_tokens} tokens; allowed: an integer of at least 1")
        pages = -(-pool_tokens // PAGE_SIZE)
        self.spec = spec
        self.allocator = SlotAllocator(pages, PAGE_SIZE)
        self.window = _window(spec)
        self.window_map: WindowMap | None = None
        self._fresh: list[int] = []

        self.dtype = pool_dtype(spec, dtype)
        windowed = sum(window is not None for window in spec.windows)
        slot_bytes = row_bytes(spec.row, self.dtype) * (len(spec.windows) - windowed)
        # Layers with a window have a slot map at least.
        if pages * PAGE_SIZE * max(slot_bytes, 8) > _most_memory(spec.device):
            raise MemoryError
        self.pools: dict[bool, Pool] = {}
        if windowed < len(spec.windows):
            self.pools[False] = self._new_pool(len(spec.windows) - windowed, pages)
        if self.window is not None:
            # A window touches one page more than it fills, and so does the chunk after it.
            window_pages = max_requests * (self.allocator.pages_for(self.window) + 2)
            window_pages = min(pages, window_pages + self.allocator.pages_for(max_batch_tokens))
            self.pools[True] = self._new_pool(windowed, window_pages)
            self.window_map = WindowMap(
                full_pages=pages,
                window_pages=window_pages,
                page_size=PAGE_SIZE,
                device=spec.device,
            )
        self.scales: CacheScales | None = None
        self.layers: list[LayerCache] = []
        self.latent_layers: list[LatentCache] = []
        self._add_layers()

    def _new_pool(self, layers: int, pages: int) -> Pool:
        return new_pool(self.spec, self.dtype, layers=layers, pages=pages, page_size=PAGE_SIZE)

    def _add_layers(self) -> None:
        seen = {False: 0, True: 0}
        for window in self.spec.windows:
            kind = window is not None
            pool, layer = self.pools[kind], seen[kind]
            slot_map = self.window_map.slot_map if kind and self.window_map else None
            if isinstance(pool, MHAPool):
                tensors = pool.k(layer), pool.v(layer), *pool.scales(layer)
                self.layers.append(LayerCache(*tensors, slot_map))
            else:
                rows = pool.rows(layer), pool.scale(layer)
                self.latent_layers.append(LatentCache(*rows, slot_map))
            seen[kind] += 1

    def set_scales(self, scales: CacheScales) -> None:
        """Give an fp8 pool its scales, which are 1 until then.

        They hold for every row, so this is for a cache of which no page was ever handed out. Raises
        `RopoolError` for scales that do not fit the model.
        """
        if self.allocator.peak_used_slots:
            raise RopoolError("the cache scales cannot change: rows are stored with them already")
        scales.check(self.spec)
        stored: list[tuple[Tensor | None, ...]]
        stored = [(layer.k_scale, layer.v_scale) for layer in self.layers]
        stored += [(layer.scale,) for layer in self.latent_layers]
        for layer, targets in enumerate(stored):
            for target, value in zip(targets, scales.values, strict=True):
                if target is None:
                    raise RopoolError("cache scales are for a pool of cache_dtype fp8 only")
                target.copy_(value[layer])
        self.scales = scales

    @property
    def bytes_per_token(self) -> int:
        """Pool bytes of the layers that keep a token as long as its request runs."""
        return self._bytes_per_token(False)

    @property
    def window_bytes_per_token(self) -> int:
        """Pool bytes of the layers that keep a token while it is inside their window."""
        return self._bytes_per_token(True)

    def _bytes_per_token(self, windowed: bool) -> int:
        pool = self.pools.get(windowed)
        return 0 if pool is None else pool.nbytes // (pool.pages * pool.page_size)

    def reserve(self, table: PageTable, start: int, end: int) -> bool:
        """Make the slots of tokens `start` to `end` writable, and let go of what no token from
        `start` on can see. Return whether there was room; when not, no page was taken."""
        needed = self.allocator.pages_for(end) - len(table.pages)
        if self.window_map is not None and self.window is not None:
            first = max(start - self.window + 1, 0) // PAGE_SIZE
            self.window_map.release(table.pages[table.first_backed : first])
            table.first_backed = max(table.first_backed, min(first, len(table.pages)))
            if needed > self.window_map.allocator.free_pages:
                return False
        if needed > self.allocator.free_pages:
            return False
        if needed > 0:
            taken = self.allocator.allocate(needed)
            table.pages += taken
            self._fresh += taken
            if self.window_map is not None:
                self.window_map.back(taken)
        return True

    def readable(self, table: PageTable, end: int, windowed: bool) -> tuple[list[int], int]:
        """The pages of the full or the window pool that hold a request's tokens up to `end`, and
        the position of the first row of the first page."""
        pages = table.pages[: self.allocator.pages_for(end)]
        if not windowed or self.window_map is None:
            return pages, 0
        first = table.first_backed
        return [self.window_map.window_page(page) for page in pages[first:]], first * PAGE_SIZE

    def release(self, table: PageTable) -> None:
        """Take back every page of a request."""
        if self.window_map is not None:
            self.window_map.release(table.pages[table.first_backed :])
        self.allocator.free(table.pages)
        table.pages = []
        table.first_backed = 0

    def clear_fresh(self) -> None:
        """Zero the pages handed out since the last call; called before they are written."""
        # A page may have been taken and given back (preemption) in between, or taken twice.
        fresh, self._fresh = sorted(set(self._fresh)), []
        if not fresh:
            return
        if False in self.pools:
            self.pools[False].clear(fresh)
        if self.window_map is not None:
            backing = [self.window_map.window_page(page) for page in fresh]
            if backed := [page for page in backing if page >= 0]:
                self.pools[True].clear(backed)


def _most_memory(device: torch.device) -> int:
    """Bytes that no pool exceeds. Those of a CPU are asked for first: a system may hand out more
    than it has."""
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**63 - 1


def _window(spec: ModelSpec) -> int | None:
    windows = sorted({window for window in spec.windows if window is not None})
    if len(windows) > 1:
        raise RopoolError(
            f"the model's layers have different sliding windows, {windows}; one is covered"
        )
    return windows[0] if windows else None
