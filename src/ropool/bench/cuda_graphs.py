"""Time on a GPU with CUDA graphs: each call is a node, so that host time does not count, and every
node finds a cold cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch

from ropool.bench.timing import Sample, Samplers, Timed

COPY_BYTES = 2 << 30
FLUSH_BYTES = 512 << 20
FIRST_GRAPHS = 32
"""Kernels that do not overlap can run faster in some graphs of a process than in all others; with
so many alive from the start, none of those that were measured did."""
WARM_UP_CALLS = 3
NODES = 256
CYCLES = 4
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

    def prepare(self, call: Timed, sets: Sequence[Any]) -> Samplers:
        """Capture calls on all sets. A second graph has no overlap, where the first has."""
        graph, count = self._calls(call, sets)
        overlapping = self._sample(graph, count)
        if not early_edges(graph):
            return Samplers(overlapping)
        graph, count = self._calls(call, sets)
        serialise(graph)
        return Samplers(overlapping, self._sample(graph, count))

    def _calls(
        self, call: Callable[[Any], object], sets: Sequence[Any]
    ) -> tuple[torch.cuda.CUDAGraph, int]:
        """A captured graph, and of how many calls."""
        count = len(sets) * max(1, min(CYCLES, NODES // len(sets)))
        self._warm_up(lambda: call(sets[0]))

        def run() -> None:
            for inputs in islice(cycle(sets), count):
                call(inputs)

        return self._capture(run), count

    def _sample(self, graph: torch.cuda.CUDAGraph, count: int) -> Sample:
        """Replays a graph of `count` calls with a cold cache."""
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


Edge = tuple[Any, Any, Any]
"""From, to, and what the edge means."""


def early_edges(graph: torch.cuda.CUDAGraph) -> list[Edge]:
    """The edges of a captured graph that let a kernel start while the one before it drains
    (programmatic dependent launch). None without `cuda.bindings`."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return []
    handle = driver.CUgraph(graph.raw_cuda_graph())
    *_, count = succeeded(driver.cuGraphGetEdges(handle, 0))
    sources, targets, data, _ = succeeded(driver.cuGraphGetEdges(handle, count))
    ordinary = int(driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_DEFAULT)
    edges = zip(sources, targets, data, strict=False)
    return [(source, target, edge) for source, target, edge in edges if edge.type != ordinary]


def serialise(graph: torch.cuda.CUDAGraph) -> None:
    """Make every kernel of a captured graph wait for the end of the one before it."""
    from cuda.bindings import driver

    handle, plain = driver.CUgraph(graph.raw_cuda_graph()), driver.CUgraphEdgeData()
    for source, target, edge in early_edges(graph):
        succeeded(driver.cuGraphRemoveDependencies(handle, [source], [target], [edge], 1))
        succeeded(driver.cuGraphAddDependencies(handle, [source], [target], [plain], 1))


def succeeded(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver returned beside its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"bench: a call on a CUDA graph failed: {status}")
    return tuple(values)
