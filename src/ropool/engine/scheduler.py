"""Which requests run in the next step, and with how many tokens.

First come, first served. Requests join and leave between steps; long prompts are computed in chunks
beside the decoding of others. When the pool is full the youngest request gives its pages back and
is computed anew later.
"""

from __future__ import annotations

from collections import deque

from ropool.engine.cache import KVCache
from ropool.engine.request import Request
from ropool.errors import RopoolError


class Scheduler:
    """Holds every unfinished request: those `running` own pages, those `waiting` own none.

    Both are in order of arrival, and every running request is older than every waiting one. The
    oldest can always be served, since it may take the pages of all others; so there is always
    progress.
    """

    def __init__(self, cache: KVCache, *, max_requests: int, max_batch_tokens: int) -> None:
        if not 1 <= max_requests <= max_batch_tokens:
            raise RopoolError(
                f"Scheduler: max_requests={max_requests}, max_batch_tokens={max_batch_tokens}; "
                "allowed: 1 <= max_requests <= max_batch_tokens, as each may decode in a step"
            )
        self._cache = cache
        self._max_requests = max_requests
        self._max_batch_tokens = max_batch_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request and take back its pages."""
        if request in self.running:
            self.running.remove(request)
            self._cache.release(request.table)
        else:
            self.waiting.remove(request)

    def restart(self, request: Request) -> None:
        """Let a running request compute all its tokens anew, in its place among the others."""
        self._cache.release(request.table)
        request.computed = 0

    def schedule(self) -> list[tuple[Request, int]]:
        """Reserve slots for the next step; return each request that takes part with its number of
        tokens: those that decode first, the longest in front. Empty only when no request is left.
        """
        decoding = sum(request.remaining == 1 for request in self.running)
        room = self._max_batch_tokens - decoding  # for prompts
        batch: list[tuple[Request, int]] = []
        preemptions = self.preemptions
        index = 0
        while index < len(self.running):
            request = self.running[index]
            count = 1 if request.remaining == 1 else min(request.remaining, room)
            if count and not self._reserve_or_preempt(request, count):
                break  # it was the youngest itself
            if count:
                batch.append((request, count))
            if request.remaining > 1:
                room -= count
            index += 1
        if self.preemptions == preemptions:
            self._admit(batch, room)
        if not batch and (self.running or self.waiting):
            # A defect: this would go on for ever.
            raise RuntimeError(
                f"Scheduler: {len(self.running) + len(self.waiting)} requests, and none can run"
            )
        return sorted(batch, key=lambda pair: (pair[1] > 1, -pair[0].computed))

    def _reserve_or_preempt(self, request: Request, count: int) -> bool:
        while not self._reserve(request, count):
            victim = self.running.pop()
            self.restart(victim)
            self.waiting.appendleft(victim)
            self.preemptions += 1
            if victim is request:
                return False
        return True

    def _reserve(self, request: Request, count: int) -> bool:
        return self._cache.reserve(request.table, request.computed, request.computed + count)

    def _admit(self, batch: list[tuple[Request, int]], room: int) -> None:
        allocator = self._cache.allocator
        while self.waiting and room > 0 and len(self.running) < self._max_requests:
            request = self.waiting[0]
            count = min(request.remaining, room)
            # A prompt that fits in part only would be preempted before it is through.
            if allocator.pages_for(len(request.tokens)) > allocator.free_pages:
                return
            if not self._reserve(request, count):
                return
            self.running.append(self.waiting.popleft())
            batch.append((request, count))
            room -= count
