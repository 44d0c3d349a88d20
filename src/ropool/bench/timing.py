"""Time on a CPU, and the rounds that every kind of device shares: all callables in turn, round
after round, so that whatever drifts hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

Timed = Callable[[Any], object]
Sample = Callable[[], float]
"""Runs a callable some times and gives microseconds a call."""

SAMPLE_SECONDS = 2e-3
"""A sample lasts at least so long; its value is the mean of its calls."""
SETTLE_SECONDS = 3e-3
"""Before each sample the callable runs untimed for so long: the worker threads of the one before it
spin for a while before they sleep."""
COPY_BYTES = 256 << 20
STREAMING_THREADS = 4
STREAMING_COPIES = 9


class Samplers(NamedTuple):
    """How a call is sampled: as it is, and, where its kernels overlap neighbours, without that."""

    overlapping: Sample
    serial: Sample | None = None


class Timing(NamedTuple):
    """The samples by name, and the bandwidth of a plain copy between them: its median."""

    samples: dict[str, list[float]]
    serial: dict[str, list[float]]
    copy_gbps: float


class Timer(Protocol):
    """How calls are timed on a kind of device."""

    def prepare(self, call: Timed, sets: Sequence[Any]) -> Samplers:
        """Warm `call` up and make what takes its samples."""

    def copy_gbps(self) -> float:
        """Bytes read plus bytes written a second, in 10^9, of one large copy."""


def interleaved(samplers: Mapping[str, Samplers], timer: Timer, rounds: int) -> Timing:
    """`rounds` times a copy and a sample of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    serial: dict[str, list[float]] = {name: [] for name in samplers}
    copies = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            copies.append(timer.copy_gbps())
            for name, sampler in samplers.items():
                taken[name].append(sampler.overlapping())
                if sampler.serial is not None:
                    serial[name].append(sampler.serial())
    finally:
        gc.enable()
    return Timing(taken, serial, float(np.median(copies)))


class CpuTimer:
    """Times with the host's clock; consecutive calls take consecutive sets."""

    def __init__(self) -> None:
        # Written here, so that the pages are there when the copy is timed.
        self._source, self._target = torch.ones(2, COPY_BYTES // 4).unbind()

    def prepare(self, call: Timed, sets: Sequence[Any]) -> Samplers:
        """Find how many calls fill a sample."""
        turn = cycle(sets)
        call(next(turn))
        settle(call, turn)
        batch = list(islice(turn, 2))
        each = microseconds(call, batch) / len(batch)
        count = max(1, round(SAMPLE_SECONDS * 1e6 / each))

        def sample() -> float:
            settle(call, turn)
            return microseconds(call, list(islice(turn, count))) / count

        return Samplers(sample)

    def copy_gbps(self) -> float:
        """By PyTorch, with ordinary stores and as many threads as the kernels use."""
        start = time.perf_counter()
        self._target.copy_(self._source)
        return 2 * COPY_BYTES / (time.perf_counter() - start) / 1e9


def streaming_copy_gbps() -> float:
    """As `CpuTimer.copy_gbps`, but with stores that go past the cache, which an ordinary store
    does not: it first reads the line that it writes. The C library's `memcpy` uses them for pieces
    of this size."""
    threads = min(torch.get_num_threads(), STREAMING_THREADS)
    source, target = np.ones((2, threads, COPY_BYTES), dtype=np.uint8)
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(STREAMING_COPIES):
            start = time.perf_counter()
            list(pool.map(np.copyto, target, source))
            found.append(2 * source.nbytes / (time.perf_counter() - start) / 1e9)
    return float(np.median(found))


def microseconds(call: Timed, batch: Sequence[Any]) -> float:
    """What the calls of a batch take together."""
    start = time.perf_counter_ns()
    for inputs in batch:
        call(inputs)
    return (time.perf_counter_ns() - start) / 1e3


def settle(call: Timed, turn: Iterator[Any]) -> None:
    """Run untimed for `SETTLE_SECONDS`."""
    end = time.perf_counter() + SETTLE_SECONDS
    while True:
        call(next(turn))
        if time.perf_counter() >= end:
            return
