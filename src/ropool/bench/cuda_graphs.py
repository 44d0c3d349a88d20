"""Time on a GPU with CUDA graphs: each call is a node, so that host time does not count, and every
node finds a cold cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ropool.bench.inputs import Inputs
from ropool.bench.timing import Sample, Timed

COPY_BYTES = 2 << 30
FLUSH_BYTES = 512 << 20
THROW_AWAY_GRAPHS = 8
"""The first graphs of a process replay faster than all later ones."""
WARM_UP_CALLS = 3


class CudaTimer:
    """Replays graphs whose nodes take one set each; before a replay the L2 cache is read full of
    something else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._other = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device=device)
        self._target = torch.zeros_like(self._source)
        for _ in range(THROW_AWAY_GRAPHS):
            self._capture(lambda: self._other[:1024].mul_(1.0)).replay()
        torch.cuda.synchronize(device)

    def prepare(self, call: Timed, sets: Sequence[Inputs]) -> Sample:
        """Capture one call on each set."""
        graph = self._capture(lambda: [call(inputs) for inputs in sets], lambda: call(sets[0]))
        graph.replay()

        def sample() -> float:
            self._other.sum()
            return self._microseconds(graph.replay) / len(sets)

        return sample

    def copy_gbps(self) -> float:
        """Of an eager copy: a captured one of this size becomes a copy node, which is slower."""
        took = self._microseconds(lambda: self._target.copy_(self._source))
        return 2 * COPY_BYTES / took / 1e3

    def _capture(
        self, run: Callable[[], object], warm_up: Callable[[], object] = lambda: None
    ) -> torch.cuda.CUDAGraph:
        current = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                warm_up()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        return graph

    def _microseconds(self, run: Callable[[], object]) -> float:
        """Time on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)
