"""Time on a GPU with CUDA graphs: each call is a node, so that host time does not count, and every
node finds a cold cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch

from ropool.bench.inputs import Inputs
from ropool.bench.timing import Sample, Samplers, Timed

COPY_BYTES = 2 << 30
FLUSH_BYTES = 512 << 20
FIRST_GRAPHS = 32
"""Kernels that do not overlap run a third of a microsecond faster in some graphs of a process than
in all others; with so many alive from the start, none of those that were measured did."""
WARM_UP_CALLS = 3
NODES = 256
CYCLES = 8
"""A graph calls so often on each set, but no more than `NODES` times: one of a few long calls would
measure its own start."""


class CudaTimer:
    """Replays graphs of calls that take one set after the other; before a replay the L2 cache is
    read full of something else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._other = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device=device)
        self._target = torch.zeros_like(self._source)
        small = self._other[:1024]
        self._first = [
            self._capture(lambda: [small.mul_(1.0) for _ in range(50)]) for _ in range(FIRST_GRAPHS)
        ]
        for graph in self._first:
            graph.instantiate()
            graph.replay()
        torch.cuda.synchronize(device)

    def prepare(self, call: Timed, sets: Sequence[Inputs]) -> Samplers:
        """Capture calls on all sets. A second graph has no overlap, where the first has."""
        overlapping = self.sampler(call, sets)
        assert overlapping is not None
        return Samplers(overlapping, self.sampler(call, sets, serial=True))

    def sampler(
        self, call: Callable[[Any], object], sets: Sequence[Any], serial: bool = False
    ) -> Sample | None:
        """Capture calls on all sets; `serial`: without overlap, `None` when they have none."""
        count = len(sets) * max(1, min(CYCLES, NODES // len(sets)))
        calls = list(islice(cycle(sets), count))
        self._warm_up(lambda: call(sets[0]))
        graph = self._capture(lambda: [call(inputs) for inputs in calls])
        if serial and not serialise(graph.raw_cuda_graph()):
            return None
        graph.instantiate()
        graph.replay()

        def sample() -> float:
            self._other.sum()
            return self._microseconds(graph.replay) / count

        return sample

    def copy_gbps(self) -> float:
        """Of an eager copy: a captured one of this size becomes a copy node, which is slower."""
        took = self._microseconds(lambda: self._target.copy_(self._source))
        return 2 * COPY_BYTES / took / 1e3

    def _warm_up(self, run: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_CALLS):
                run()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)

    def _capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Not by `torch.cuda.graph`, which empties the allocator's cache each time."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(self._stream):
            graph.capture_begin()
            try:
                run()
            finally:
                graph.capture_end()
        return graph

    def _microseconds(self, run: Callable[[], object]) -> float:
        """Time on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)


def serialise(graph: int) -> bool:
    """Replace the edges of a captured graph that let a kernel start while the one before it drains
    (programmatic dependent launch) by ordinary ones. False when it has none."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return False

    def done(result: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = result
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"bench: a call on a CUDA graph failed: {status}")
        return tuple(values)

    handle = driver.CUgraph(graph)
    *_, count = done(driver.cuGraphGetEdges(handle, 0))
    sources, targets, data, count = done(driver.cuGraphGetEdges(handle, count))
    ordinary = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_DEFAULT
    early = [
        (source, target, edge)
        for source, target, edge in zip(sources, targets, data, strict=False)
        if edge.type != int(ordinary)
    ]
    for source, target, edge in early:
        done(driver.cuGraphRemoveDependencies(handle, [source], [target], [edge], 1))
        plain = driver.CUgraphEdgeData()
        done(driver.cuGraphAddDependencies(handle, [source], [target], [plain], 1))
    return bool(early)
