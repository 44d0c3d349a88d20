"""Who owns which page of a pool.

A page is taken or given back in constant time, and a page given back twice, or never, is an error
here rather than another request's text.
"""

from __future__ import annotations

from collections.abc import Iterable


class PoolExhaustedError(RuntimeError):
    """More pages were asked for than are free."""


class SlotAllocator:
    """Hands out the pages of a pool of `pages * page_size` slots; page `p` holds slots `p * B` to
    `(p + 1) * B - 1`.

    With `page_size` 1 a page is a slot. Holds no tensor. Not thread-safe.
    """

    def __init__(self, pages: int, page_size: int = 1) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(
                f"SlotAllocator: pages={pages}, page_size={page_size}; both must be at least 1"
            )
        self.pages = pages
        self.page_size = page_size
        # Nothing here is as large as the pool, which may be one that no memory holds.
        self._free: list[int] = []  # given back: a stack
        self._fresh = 0  # this page and those after it were never handed out
        self._used: set[int] = set()
        self._peak = 0

    @property
    def slots(self) -> int:
        """Slots in the pool, `S = P * B`."""
        return self.pages * self.page_size

    @property
    def free_pages(self) -> int:
        """Pages that can be allocated now."""
        return self.pages - len(self._used)

    @property
    def used_slots(self) -> int:
        """Slots of the pages that are handed out. At the end of all requests: the slots leaked."""
        return len(self._used) * self.page_size

    @property
    def peak_used_slots(self) -> int:
        """The most slots that were ever handed out at once."""
        return self._peak * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Raises `PoolExhaustedError`, and takes none, when fewer are free."""
        if count < 0:
            raise ValueError(f"SlotAllocator.allocate: count is {count}, must not be negative")
        if count > self.free_pages:
            raise PoolExhaustedError(
                f"SlotAllocator.allocate: {count} pages asked for, {self.free_pages} of "
                f"{self.pages} are free"
            )
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = count - len(taken)
        taken += range(self._fresh, self._fresh + fresh)
        self._fresh += fresh
        self._used.update(taken)
        self._peak = max(self._peak, len(self._used))
        return taken

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises `ValueError` at a page that does not exist or is free already;
        those before it in `pages` have then been given back."""
        for page in pages:
            if not 0 <= page < self.pages:
                raise ValueError(
                    f"SlotAllocator.free: page {page} is outside of the pool's {self.pages} pages"
                )
            if page not in self._used:
                raise ValueError(f"SlotAllocator.free: page {page} is free already (double free)")
            self._used.remove(page)
            self._free.append(page)

    def check_no_leak(self) -> None:
        """Raise `RuntimeError` naming the pages that are still handed out; for use when nothing
        should be."""
        leaked = sorted(self._used)
        if leaked:
            shown = ", ".join(map(str, leaked[:8])) + (", ..." if len(leaked) > 8 else "")
            raise RuntimeError(
                f"SlotAllocator: {len(leaked)} of {self.pages} pages leaked: {shown}"
            )
