"""Which pages of a sliding-window pool stand behind the pages of the full one.

Layers with a sliding window need only the last tokens, so their pool is smaller. Requests are
numbered by slots of the full pool everywhere; the ops translate through `slot_map`, and pages that
fall out of the window are given back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ropool.kvcache.allocator import SlotAllocator


class WindowMap:
    """Backs pages of a full pool with pages of a smaller window pool while they are inside the
    window.

    `slot_map` `[S_full]` int64: slot of the window pool, or -1 where no page stands behind.
    """

    def __init__(
        self,
        *,
        full_pages: int,
        window_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.allocator = SlotAllocator(window_pages, page_size)
        self.slot_map = torch.full((full_pages * page_size,), -1, dtype=torch.int64, device=device)
        self._by_page = self.slot_map.view(full_pages, page_size)
        self._window_page = [-1] * full_pages

    def window_page(self, full_page: int) -> int:
        """The window page behind a full page, or -1."""
        return self._window_page[full_page]

    def back(self, full_pages: Sequence[int]) -> list[int]:
        """Put a window page behind each of `full_pages` and return those window pages. Raises
        `PoolExhaustedError`, and does nothing, when too few are free; `ValueError` when one is
        backed already."""
        for page in full_pages:
            if self._window_page[page] >= 0:
                raise ValueError(f"WindowMap.back: page {page} is backed already")
        taken = self.allocator.allocate(len(full_pages))
        for page, window_page in zip(full_pages, taken, strict=True):
            self._window_page[page] = window_page
        if taken:
            device, size = self.slot_map.device, self.allocator.page_size
            first = torch.tensor(taken, device=device) * size
            rows = torch.arange(size, device=device)
            self._by_page[torch.tensor(full_pages, device=device)] = first[:, None] + rows
        return taken

    def release(self, full_pages: Sequence[int]) -> None:
        """Give back the window pages behind `full_pages`; pages that have none are passed over."""
        backed = [page for page in full_pages if self._window_page[page] >= 0]
        if not backed:
            return
        self.allocator.free([self._window_page[page] for page in backed])
        for page in backed:
            self._window_page[page] = -1
        self._by_page.index_fill_(0, torch.tensor(backed, device=self.slot_map.device), -1)
