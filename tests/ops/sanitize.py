"""Runs the GPU tests of a backend's kernels under compute-sanitizer, in many processes at once on
every GPU, and says what came of it in a line a tool.

`make sanitize` and `make sanitize-triton` run this, from the root of the repository:

    PYTHONPATH=src:tests python -m ops.sanitize BACKEND [TOOL ...] [--processes N] [--batch N]
        [--minutes M] [--out FILE]

A process runs a batch of tests, then the next one draws another; a line tells of each, and FILE has
the lines of all tools as they stand. Batches that were not clean have what they printed in a `.log`
beside FILE.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch

from ops.calls import Case, arguments
from ops.memory import compacted, placed

ROOT = Path(__file__).parents[2]
TOOLS = {
    # cuda.bindings asks for functions that older drivers do not have.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
    # PyTorch and the tests copy memory that was never written.
    "initcheck": ["--check-api-memory-access", "no"],
    "synccheck": [],
}
KERNELS = {"cuda": "ropool_kernel", "triton": "heads_kernel"}
"""What the names of a backend's kernels contain; others are not looked at."""
PLANTED = {
    "memcheck": "Invalid __global__ write",
    "initcheck": "Uninitialized __global__ memory read",
}

CUDA = ["tests/ops", "tests/cuda_backend/test_gpu.py", "tests/cuda_backend/test_devices.py"]
ENGINE = [
    f"tests/engine/test_{name}.py"
    for name in ("cuda", "families", "mla", "cache_scales", "prompt_inputs")
]
TRITON = ["tests/triton_backend/test_gpu.py"]
# Compiled models keep memory of their own; a profiler and a sanitizer exclude each other.
LEFT_OUT = "inductor or in_graphs or profiler"
# initcheck keeps a mark for every byte of memory, of which these tests take most. They run one
# after the other: a GPU has no room for all of them.
LARGE = "past_every_32_bit_limit"
# A test makes more than a hundred calls, each with a kernel of its own.
LONG = "test_random_calls"
TWO_GPUS = ("tests/cuda_backend/test_devices.py", "test_a_model_on_another_device")

OUTCOME = re.compile(r"(\d+) (passed|skipped|failed|errors?)\b")
LAST_LINE = re.compile(r"^(?:=+ )?\d+ [a-z]+.* in [\d.]+s", re.MULTILINE)
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")
SLOWEST = re.compile(r"^([\d.]+s) call +(\S+)", re.MULTILINE)


class Batch(NamedTuple):
    """What one process runs under a tool: tests, or the planted fault where there are none."""

    tool: str
    tests: Sequence[str] = ()
    gpus: int = 1


class Outcome(NamedTuple):
    """What one process said. `errors` is `None` where the tool has not come to its end."""

    tests: Counter[str]
    errors: int | None
    output: str

    @property
    def clean(self) -> bool:
        wrong = self.tests.keys() - {"passed", "skipped"}
        return self.errors == 0 and bool(self.tests) and not wrong


def environment(backend: str, gpus: Sequence[str] | None = None) -> dict[str, str]:
    """Without a cache of memory every tensor has an end that the tools see."""
    seen = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    return {
        **os.environ,
        **seen,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        "PYTHONUNBUFFERED": "1",
        "ROPOOL_REQUIRE_BACKENDS": backend,
        "OMP_NUM_THREADS": "1",
        "CUDA_MODULE_LOADING": "LAZY",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def tests_in(batch: Batch) -> list[str]:
    """The name of each test stands before what a tool prints of it."""
    return pytest("-v", "--durations=1", "--durations-min=1", *batch.tests)


def tests_of(backend: str, tool: str) -> list[str]:
    """The tests that a tool runs. Under memcheck the engine calls the CUDA kernels as models do,
    and the Triton kernels, which take half a second each to compile, run the tests of the ops."""
    paths, more = {"cuda": (CUDA, ENGINE), "triton": (TRITON, ["tests/ops"])}[backend]
    paths = paths + more if tool == "memcheck" else paths
    left_out = LEFT_OUT + (f" or {LARGE}" if tool == "initcheck" else "")
    command = pytest("-q", "--collect-only", "-k", f"{backend} and not ({left_out})", *paths)
    found = subprocess.run(
        command, cwd=ROOT, env=environment(backend), capture_output=True, text=True
    )
    if found.returncode:
        raise SystemExit(found.stdout + found.stderr)
    return [line for line in found.stdout.splitlines() if "::" in line]


def batches(tool: str, tests: Sequence[str], size: int) -> list[Batch]:
    """The tests in batches of `size`, those first that take long. Every nth test, so that tests
    which are alike, and alike slow, meet in no batch."""

    def cut(tests: Sequence[str], size: int, gpus: int = 1) -> list[Batch]:
        count = -(-len(tests) // max(size, 1))
        return [Batch(tool, tests[first::count], gpus) for first in range(count)]

    large = [test for test in tests if LARGE in test]
    long = [test for test in tests if LONG in test]
    two = [test for test in tests if any(name in test for name in TWO_GPUS)]
    others = [test for test in tests if test not in {*large, *long, *two}]
    return [
        *cut(large, len(large)),
        *cut(long, 1),
        *cut(two, size, 2),
        *cut(others, size),
    ]


def under(
    tool: str, backend: str, command: Sequence[str], gpus: Sequence[str] | None = None
) -> str:
    """Run a command under a tool; return what both print."""
    sanitizer = ["compute-sanitizer", "--tool", tool, *TOOLS[tool]]
    sanitizer += ["--target-processes", "application-only"]
    # For backtraces the releases 2025.1 to 2025.4 keep the frames of Python that they find at a
    # launch: their tensors would live on, and no access after their end would be seen.
    sanitizer += ["--show-backtrace", "no"]
    sanitizer += ["--kernel-name", f"kernel_substring={KERNELS[backend]}"]
    with tempfile.TemporaryFile("w+") as log:
        subprocess.run(
            [*sanitizer, *command],
            cwd=ROOT,
            env=environment(backend, gpus),
            stdout=log,
            stderr=log,
        )
        log.seek(0)
        return log.read()


def read(output: str) -> Outcome:
    """The outcome of a process, from what it printed."""
    tests: Counter[str] = Counter()
    for line in LAST_LINE.findall(output)[-1:]:
        for count, word in OUTCOME.findall(line):
            tests[word] += int(count)
    ends = SUMMARY.findall(output)
    return Outcome(tests, sum(map(int, ends)) if ends else None, output)


class Run:
    """Batches of several tools over several GPUs, and what has come of them."""

    def __init__(self, backend: str, gpus: Sequence[str], processes: int, out: Path | None) -> None:
        self.backend = backend
        self.gpus = gpus
        self.processes = processes
        self.out = out
        self.head = ""
        self.tests: dict[str, int] = {}
        self.outcomes: dict[str, list[Outcome]] = {}
        self.planted: dict[str, bool] = {}
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._lock = Lock()

    def work(self, all_batches: Iterable[Batch], seconds: float | None) -> None:
        """Run the batches in their order; after so many seconds none is begun any more."""
        left = deque(all_batches)
        for batch in left:
            self.tests[batch.tool] = self.tests.get(batch.tool, 0) + len(batch.tests)
            self.outcomes.setdefault(batch.tool, [])
        self._write()

        def draw(number: int) -> None:
            while seconds is None or time.monotonic() - self._began < seconds:
                try:
                    batch = left.popleft()
                except IndexError:
                    return
                self._run(batch, number)

        with ThreadPoolExecutor(self.processes) as pool:
            list(pool.map(draw, range(self.processes)))

    def _run(self, batch: Batch, number: int) -> None:
        began = time.monotonic()
        gpus = [
            self.gpus[(number + i) % len(self.gpus)] for i in range(min(batch.gpus, len(self.gpus)))
        ]
        planted = [sys.executable, "-m", "ops.sanitize", self.backend, "--planted", batch.tool]
        command = tests_in(batch) if batch.tests else planted
        output = under(batch.tool, self.backend, command, gpus)
        took = f"GPU {','.join(gpus)}: {time.monotonic() - began:.0f} s"
        with self._lock:
            if batch.tests:
                outcome = read(output)
                self.outcomes[batch.tool].append(outcome)
                fine, said = outcome.clean, f"{self.line(batch.tool)}; {took}"
                for slowest in SLOWEST.findall(output)[:1]:
                    said += f", of which {' '.join(slowest)}"
            else:
                fine = self.planted[batch.tool] = PLANTED[batch.tool] in output
                said = f"{self.control(batch.tool)}; {took}"
            self._seconds[batch.tool] = time.monotonic() - self._began
            print(said, flush=True)
            self._write()
            if not fine:
                print(output[-3000:], flush=True)
                if self.out is not None:
                    with self.out.with_suffix(".log").open("a") as log:
                        log.write(output)

    def line(self, tool: str) -> str:
        """What a tool found so far."""
        outcomes = self.outcomes[tool]
        total = sum((outcome.tests for outcome in outcomes), Counter[str]())
        said = [f"{sum(outcome.errors or 0 for outcome in outcomes)} errors"]
        said += [f"{count} tests {word}" for word, count in sorted(total.items())]
        missing = self.tests[tool] - total.total()
        said += [f"{missing} tests not run"] if missing else []
        unfinished = sum(outcome.errors is None for outcome in outcomes)
        said += [f"{unfinished} processes did not end"] if unfinished else []
        return f"{tool}: {', '.join(said)}"

    def control(self, tool: str) -> str:
        """Whether a tool saw the planted fault in our kernel, and so our kernel at all."""
        seen = {None: "not run", False: "not seen", True: PLANTED[tool]}[self.planted.get(tool)]
        return f"{tool}, planted fault: {seen}"

    def lines(self) -> list[str]:
        """All that is known."""
        said = [self.head]
        for tool in (tool for tool in TOOLS if tool in self.outcomes):
            said += [self.control(tool)] if tool in PLANTED else []
            ended = f" after {self._seconds[tool]:.0f} s" if tool in self._seconds else ""
            said.append(self.line(tool) + ended)
        processes = f"{self.processes} processes at once, {len(self.gpus)} GPUs"
        return [*said, f"{processes}, {time.monotonic() - self._began:.0f} s"]

    @property
    def clean(self) -> bool:
        """Whether every test ran and passed, nothing was found, and every planted fault was."""
        return all(
            sum(outcome.tests.total() for outcome in outcomes) == self.tests[tool]
            and all(outcome.clean for outcome in outcomes)
            and (tool not in PLANTED or self.planted.get(tool) is True)
            for tool, outcomes in self.outcomes.items()
        )

    def _write(self) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text("\n".join(self.lines()) + "\n")


def plant(tool: str, backend: str) -> None:
    """Store past the end of a pool (memcheck), or store keys that were never written."""
    from ropool.ops._call import described

    bind = importlib.import_module(f"ropool.backends.{backend}.launch").bind
    case = Case(op="store_kv_", layout="slots", pages=1 << 18, tokens=4)
    args = placed(compacted(arguments(case)), "cuda")
    if tool == "memcheck":
        args["slot_mapping"].fill_(case.pages - 1)
    else:
        args["k"] = torch.empty_like(args["k"])
    call = described("sanitize", case.op, (), args)
    key, options = call.key()
    tensors = call.tensors
    launch = bind(key, tensors, options)
    if tool == "memcheck":
        # The launch trusts what it was bound for: no memory is left where the last slot was.
        pools = [name.endswith("_pool") for name in call.op.tensors]
        tensors = tuple(
            tensor[:8].clone() if pool else tensor
            for pool, tensor in zip(pools, tensors, strict=True)
        )
    del args, call
    launch(tensors)
    torch.cuda.synchronize()


def visible() -> list[str]:
    """The GPUs that may be used, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def version() -> str:
    """Of compute-sanitizer, and what it runs on."""
    said = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True)
    number = re.search(r"Version (\S+)", said.stdout)
    return (
        f"compute-sanitizer {number[1] if number else ''}, {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tools that were named, or all, each after its planted fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("backend", choices=KERNELS)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)} (all)")
    processes = max(1, (os.cpu_count() or 1) - 1)
    parser.add_argument("--processes", type=int, default=processes, help="at once (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="tests of a process (%(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no batch after so many")
    parser.add_argument("--out", type=Path, help="write the lines to this file too")
    parser.add_argument("--planted", choices=PLANTED, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.planted:
        plant(given.planted, given.backend)
        return 0
    tools = given.tools or list(TOOLS)
    for tool in tools:
        if tool not in TOOLS:
            parser.error(f"tool is {tool!r}; known: {', '.join(TOOLS)}")
    if given.out is not None:
        given.out.with_suffix(".log").unlink(missing_ok=True)
    run = Run(given.backend, visible(), given.processes, given.out)
    run.head = version()
    work = [Batch(tool) for tool in tools if tool in PLANTED]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda tool: tests_of(given.backend, tool), tools)
        for tool, tests in zip(tools, found, strict=True):
            work += batches(tool, tests, given.batch)
    run.work(work, None if given.minutes is None else 60 * given.minutes)
    print("\n".join(run.lines()), flush=True)
    return 0 if run.clean else 1


if __name__ == "__main__":
    sys.exit(main())
