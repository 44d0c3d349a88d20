"""Measures how a backend's kernels are best laid out on this GPU, for `ropool tune`."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import ropool
from ropool.bench.cuda_graphs import CudaTimer
from ropool.bench.events import EventTimer
from ropool.bench.scratch import Subject, arguments
from ropool.bench.timing import Sample
from ropool.dispatch import tuning
from ropool.dispatch.key import Key, Options
from ropool.dispatch.tuning import Choice, Table
from ropool.errors import RopoolError
from ropool.ops._call import described

ROTATE_BYTES = 400 << 20
MOST_SETS = 160
LEAST_SETS = 4
SAMPLES, FINAL_SAMPLES = 3, 11
FINALISTS = 4
NO_GAIN = 0.995
"""A layout has to be so much faster to be preferred to one that was tried before it."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best layout for one call. Times are medians in microseconds, where kernels can overlap
    the geometric mean of calls that overlap their neighbours and calls that do not; `before` is
    that of the layout in force so far."""

    subject: Subject
    tokens: int
    choice: Choice
    best_us: float
    before_us: float


class Tuner:
    """Times layouts of `backend` on `device`, on tensors of its own."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.backend = backend
        self.device = device
        self.candidates = candidates_of(backend)
        self._timer = EventTimer(device) if device.type == "xpu" else CudaTimer(device)

    def tune(self, subject: Subject, tokens: int) -> tuple[Key, Found]:
        """The best layout: of all the first, then of its refinements, then the finalists once more
        with many samples in turn."""
        sets = self._sets(subject, tokens)
        op = getattr(ropool, subject.op)
        call = described("tune", subject.op, (), sets[0])
        args, (key, options) = call.tensors, call.key()
        first = self.candidates.layouts(key, tokens)
        self._prepare(key, args, options, first)
        timed = {index: self._time(op, sets, choice) for index, choice in enumerate(first)}
        leading = sorted(timed, key=lambda index: timed[index])[:FINALISTS]
        choices = [first[index] for index in leading]
        refined = [
            more for choice in choices for more in self.candidates.refinements(key, tokens, choice)
        ]
        self._prepare(key, args, options, refined)
        times = [timed[index] for index in leading]
        times += [self._time(op, sets, choice) for choice in refined]
        choices += refined
        order = sorted(range(len(choices)), key=lambda index: times[index])[:FINALISTS]
        finalists = [self._in_force(key, args, options), *(choices[index] for index in order)]
        samples = [self._sample(op, sets, choice) for choice in finalists]
        taken: list[list[float]] = [[] for _ in samples]
        for _ in range(FINAL_SAMPLES):
            for sample, mine in zip(samples, taken, strict=True):
                mine.append(sample())
        medians = [statistics.median(mine) for mine in taken]
        # What is in force stays unless another is faster, where the backend can say what it is.
        best = 0 if finalists[0] is not None else 1
        for index, median in enumerate(medians[1:], 1):
            if median < medians[best] * NO_GAIN:
                best = index
        choice = finalists[best]
        assert choice is not None
        return key, Found(subject, tokens, choice, medians[best], medians[0])

    def _in_force(self, key: Key, args: Any, options: Options) -> Choice | None:
        """The layout of such a call so far."""
        in_force = getattr(self.candidates, "in_force", None)
        found: Choice | None = None
        if in_force is not None:
            found = in_force(key, args, options, self.device.index or 0)
        return found

    def _sets(self, subject: Subject, tokens: int) -> list[dict[str, Any]]:
        """So many sets of arguments that no call finds what the one before left in a cache."""
        first = arguments(subject, tokens, self.device)
        inputs = ("q", "k", "v", "q_rope", "k_nope", "k_rope")
        size = sum(2 * first[name].nbytes for name in inputs if name in first)
        count = max(LEAST_SETS, min(MOST_SETS, ROTATE_BYTES // size))
        return [first, *(arguments(subject, tokens, self.device) for _ in range(count - 1))]

    def _prepare(self, key: Key, args: Any, options: Options, choices: Sequence[Choice]) -> None:
        prepare = getattr(self.candidates, "prepare", None)
        if prepare is not None:
            prepare([(key, args, options, choice) for choice in choices], self.device.index or 0)

    def _sample(self, op: Any, sets: list[dict[str, Any]], choice: Choice | None) -> Sample:
        def call(arguments: Any) -> None:
            op(**arguments, backend=self.backend)

        with tuning.trying(choice) if choice is not None else nullcontext():
            overlapping, serial = self._timer.prepare(call, sets)
        if serial is None:
            return overlapping
        return lambda: math.sqrt(overlapping() * serial())

    def _time(self, op: Any, sets: list[dict[str, Any]], choice: Choice) -> float:
        sample = self._sample(op, sets, choice)
        return statistics.median(sample() for _ in range(SAMPLES))


def candidates_of(backend: str) -> ModuleType:
    """The module that names a backend's layouts. Raises `RopoolError` for a backend without."""
    name = f"ropool.backends.{backend}.candidates"
    if importlib.util.find_spec(name) is None:
        raise RopoolError(f"tune: backend {backend} has no layouts to choose from")
    return importlib.import_module(name)


def tune(
    backend: str, device: torch.device, subjects: Sequence[Subject], tokens: Sequence[int]
) -> Iterator[tuple[Found, Table]]:
    """Every subject with every number of tokens; each comes with a table that holds it alone."""
    tuner = Tuner(backend, device)
    module = torch.xpu if device.type == "xpu" else torch.cuda
    name = module.get_device_name(device)
    made = {"ropool": ropool.__version__, "torch": torch.__version__}
    with torch.no_grad():
        for subject in subjects:
            for count in tokens:
                key, found = tuner.tune(subject, count)
                entries = {tuning.subject(key): {count: found.choice}}
                yield found, Table(backend, name, made, {}, entries)
                module.empty_cache()
