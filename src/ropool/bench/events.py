"""Time on a GPU whose PyTorch has no graphs: many calls between two events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch

from ropool.bench.timing import Samplers

FLUSH_BYTES = 512 << 20
CALLS = 256
WARM_UP_CALLS = 3


class EventTimer:
    """A call that is shorter than its launch measures the launch: small calls look alike."""

    def __init__(self, device: torch.device) -> None:
        self._module = torch.get_device_module(device)
        self._other = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device=device)

    def prepare(self, call: Callable[[Any], object], sets: Sequence[Any]) -> Samplers:
        """Time calls on all sets, one after the other; the caches hold something else before."""
        calls = list(islice(cycle(sets), max(CALLS, len(sets))))
        for _ in range(WARM_UP_CALLS):
            call(sets[0])

        def sample() -> float:
            start, end = (self._module.Event(enable_timing=True) for _ in range(2))
            self._other.sum()
            start.record()
            for inputs in calls:
                call(inputs)
            end.record()
            end.synchronize()
            return 1e3 * float(start.elapsed_time(end)) / len(calls)

        return Samplers(sample)
