"""Runs the GPU tests of a backend's kernels under compute-sanitizer, in many processes at once, and
says what came of it in a line a tool.

`make sanitize` and `make sanitize-triton` run this, from the root of the repository:

    PYTHONPATH=src:tests python -m ops.sanitize BACKEND [TOOL ...] [--processes N] [--out FILE]
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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
# initcheck keeps a mark for every byte of memory, of which these tests take most.
LARGE = "past_every_32_bit_limit"

OUTCOME = re.compile(r"(\d+) (passed|skipped|failed|errors?)\b")
LAST_LINE = re.compile(r"^\d+ [a-z]+.* in [\d.]+s", re.MULTILINE)
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")


class Outcome(NamedTuple):
    """What one process said. `errors` is `None` where the tool has not come to its end."""

    tests: Counter[str]
    errors: int | None
    output: str

    @property
    def clean(self) -> bool:
        wrong = self.tests.keys() - {"passed", "skipped"}
        return self.errors == 0 and bool(self.tests) and not wrong


def environment(backend: str) -> dict[str, str]:
    """Without a cache of memory every tensor has an end that the tools see."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        "ROPOOL_REQUIRE_BACKENDS": backend,
        "OMP_NUM_THREADS": "1",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def tests_of(backend: str, tool: str) -> list[str]:
    """The tests that a tool runs. Under memcheck the engine calls the CUDA kernels as models do,
    and the Triton kernels, which take half a second each to compile, run the tests of the ops."""
    paths, more = {"cuda": (CUDA, ENGINE), "triton": (TRITON, ["tests/ops"])}[backend]
    paths = paths + more if tool == "memcheck" else paths
    left_out = LEFT_OUT + (f" or {LARGE}" if tool == "initcheck" else "")
    command = pytest("--collect-only", "-k", f"{backend} and not ({left_out})", *paths)
    found = subprocess.run(
        command, cwd=ROOT, env=environment(backend), capture_output=True, text=True
    )
    if found.returncode:
        raise SystemExit(found.stdout + found.stderr)
    return [line for line in found.stdout.splitlines() if "::" in line]


def under(tool: str, backend: str, command: Sequence[str]) -> str:
    """Run a command under a tool; return what both print."""
    sanitizer = ["compute-sanitizer", "--tool", tool, *TOOLS[tool]]
    sanitizer += ["--target-processes", "application-only"]
    sanitizer += ["--kernel-name", f"kernel_substring={KERNELS[backend]}"]
    with tempfile.TemporaryFile("w+") as log:
        subprocess.run(
            [*sanitizer, *command], cwd=ROOT, env=environment(backend), stdout=log, stderr=log
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


def check(tool: str, backend: str, processes: int) -> tuple[bool, str]:
    """Deal the tests out to processes; whether nothing was found and none failed, and a line that
    says so."""
    tests = tests_of(backend, tool)
    began = time.monotonic()
    shards = [shard for first in range(processes) if (shard := tests[first::processes])]
    with ThreadPoolExecutor(len(shards)) as pool:
        runs = pool.map(lambda shard: read(under(tool, backend, pytest(*shard))), shards)
        outcomes = list(runs)
    for outcome in outcomes:
        if not outcome.clean:
            print(outcome.output[-6000:], flush=True)
    total = sum((outcome.tests for outcome in outcomes), Counter[str]())
    said = [f"{sum(outcome.errors or 0 for outcome in outcomes)} errors"]
    said += [f"{count} tests {word}" for word, count in sorted(total.items())]
    said += [f"{len(shards)} processes", f"{time.monotonic() - began:.0f} s"]
    unfinished = sum(outcome.errors is None for outcome in outcomes)
    said += [f"{unfinished} of them did not end"] if unfinished else []
    clean = all(outcome.clean for outcome in outcomes) and total.total() == len(tests)
    return clean, f"{tool}: {', '.join(said)}"


def control(tool: str, backend: str) -> tuple[bool, str]:
    """Whether a tool sees a planted fault in our kernel, and so our kernel at all."""
    command = [sys.executable, "-m", "ops.sanitize", backend, "--planted", tool]
    output = under(tool, backend, command)
    seen = PLANTED[tool] in output
    if not seen:
        print(output[-6000:], flush=True)
    return seen, f"{tool}, planted fault: {PLANTED[tool] if seen else 'not seen'}"


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


def version() -> str:
    """Of compute-sanitizer, and what it runs on."""
    said = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True)
    number = re.search(r"Version (\S+)", said.stdout)
    return (
        f"compute-sanitizer {number[1] if number else ''}, {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}"
    )


def main() -> int:
    """Run the tools that were named, or all, each after its planted fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("backend", choices=KERNELS)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)} (all)")
    parser.add_argument("--processes", type=int, default=12, help="at once (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the lines to this file too")
    parser.add_argument("--planted", choices=PLANTED, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.planted:
        plant(given.planted, given.backend)
        return 0
    for tool in given.tools:
        if tool not in TOOLS:
            parser.error(f"tool is {tool!r}; known: {', '.join(TOOLS)}")
    lines, clean = [version()], True
    for tool in given.tools or TOOLS:
        runs = [control(tool, given.backend)] if tool in PLANTED else []
        runs.append(check(tool, given.backend, given.processes))
        for fine, line in runs:
            print(line, flush=True)
            lines.append(line)
            clean &= fine
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text("\n".join(lines) + "\n")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
