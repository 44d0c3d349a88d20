"""Runs the GPU tests of the Triton kernels under compute-sanitizer, in many processes at once.

`make sanitize-triton` runs this: python -m triton_backend.sanitize [--processes N] [TOOL ...]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ops.calls import Case, arguments
from ops.memory import compacted, placed

GPU_TESTS = "tests/triton_backend/test_gpu.py"
TOOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "memcheck": (("--report-api-errors", "no"), (GPU_TESTS, "tests/ops")),
    "racecheck": ((), (GPU_TESTS,)),
    "initcheck": (("--check-api-memory-access", "no"), (GPU_TESTS,)),
    "synccheck": ((), (GPU_TESTS,)),
}
"""What each tool is told, for the reasons that the Makefile gives at `sanitize`, and what runs
under it."""
SANITIZER = (
    *("compute-sanitizer", "--error-exitcode", "99", "--target-processes", "application-only"),
    *("--kernel-name", "kernel_substring=heads_kernel"),
)
ROOT = Path(__file__).parents[2]
FOUND = r"Invalid __global__ write|Uninitialized __global__ memory read"


def environment() -> dict[str, str]:
    """Without a cache of memory every tensor has an end that the tools see."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        "ROPOOL_REQUIRE_BACKENDS": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def collected(paths: tuple[str, ...]) -> list[str]:
    """The tests of the Triton kernels in `paths`."""
    command = pytest("--collect-only", "-k", "triton", *paths)
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return [line for line in done.stdout.splitlines() if "::" in line]


def under(tool: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command under a tool; what it prints is in `stdout`."""
    with tempfile.TemporaryFile("w+") as log:
        full = [*SANITIZER, *TOOLS[tool][0], "--tool", tool, *command]
        done = subprocess.run(full, env=environment(), cwd=ROOT, stdout=log, stderr=log)
        log.seek(0)
        return subprocess.CompletedProcess(full, done.returncode, log.read())


def check(tool: str, processes: int) -> bool:
    """Run a tool over its tests, dealt out to processes, and say what it found; return whether that
    is nothing."""
    began = time.monotonic()
    tests = collected(TOOLS[tool][1])
    shards = [tests[first::processes] for first in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        runs = list(pool.map(lambda shard: under(tool, pytest(*shard)), filter(None, shards)))
    found = "hazards and errors found by the tool"
    counts = Counter({found: 0, "passed": 0})
    for run in runs:
        last = [line for line in run.stdout.splitlines() if re.search(r" in [\d.]+s", line)]
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", str(last[-1:])):
            counts[word] += int(number)
        for number in re.findall(r"SUMMARY: (\d+) (?:errors?|hazards?)", run.stdout):
            counts[found] += int(number)
            counts["reports"] += 1
        if run.returncode:
            print(f"--- exit status {run.returncode}", run.stdout[-6000:], sep="\n", flush=True)
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    print(f"==> {tool}: {said}; {time.monotonic() - began:.0f} s", flush=True)
    clean = counts["passed"] > 0 and counts[found] == 0 and counts["reports"] == len(runs)
    return clean and not any(run.returncode for run in runs)


def control(tool: str) -> bool:
    """Whether a tool sees a planted fault in our kernel, and so our kernel at all."""
    if tool not in ("memcheck", "initcheck"):
        return True
    run = under(tool, [sys.executable, "-m", "triton_backend.sanitize", "--planted", tool])
    seen = re.search(FOUND, run.stdout)
    print(f"==> {tool}, planted fault: {seen.group() if seen else 'not seen'}", flush=True)
    if seen is None:
        print(run.stdout[-6000:], flush=True)
    return seen is not None


def planted(tool: str) -> None:
    """Store past the end of a pool (memcheck), or store keys that were never written."""
    from ropool.backends.triton.launch import bind
    from ropool.ops._call import described

    case = Case(op="store_kv_", layout="slots", pages=1 << 18, tokens=4)
    args = placed(compacted(arguments(case)), "cuda")
    if tool == "memcheck":
        args["slot_mapping"].fill_(case.pages - 1)
    else:
        args["k"] = torch.empty_like(args["k"])
    call = described("sanitize", case.op, (), args)
    launch = bind(call.key()[0], call.tensors, call.key()[1])
    tensors = call.tensors
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


def main() -> int:
    """Run the tools that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)} (all)")
    parser.add_argument("--processes", type=int, default=12, help="at once (%(default)s)")
    parser.add_argument("--planted", choices=TOOLS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.planted:
        planted(given.planted)
        return 0
    for tool in given.tools:
        if tool not in TOOLS:
            parser.error(f"tool is {tool!r}; known: {', '.join(TOOLS)}")
    version = subprocess.run([SANITIZER[0], "--version"], capture_output=True, text=True)
    print(version.stdout.strip().splitlines()[-1])
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    clean = [control(tool) & check(tool, given.processes) for tool in given.tools or TOOLS]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
