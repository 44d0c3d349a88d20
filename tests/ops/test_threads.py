"""Calls from several Python threads at once, and calls in a forked child."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import FP8, Case, arguments
from ops.memory import placed
from oracle import compare, expected
from ropool.dispatch import settings

TESTS = Path(__file__).parent.parent


def together(works: list[Callable[[], None]]) -> None:
    """Run all at the same moment; raises what the first failing one raised."""
    barrier, errors = threading.Barrier(len(works)), []

    def run(work: Callable[[], None]) -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a call hangs"
    if errors:
        raise errors[0]


def test_concurrent_calls(backend: Backend) -> None:
    """Small calls, and calls large enough for several threads, first calls with a cold cache among
    them."""
    cases = [
        Case(op=op, seed=seed, tokens=tokens, pages=256, heads_q=8, pool_dtype=pool, head_dim=64)
        for seed, (op, tokens, pool) in enumerate(
            [
                ("rope_store_kv_", 520, "model"),
                ("rope_store_kv_", 1, FP8[0]),
                ("rope_", 800, "model"),
                ("store_kv_", 1000, "model"),
                ("store_mla_", 600, "model"),
                ("rope_store_mla_", 3, "model"),
            ]
        )
    ]
    built = [(case, arguments(case)) for case in cases]
    wanted = [expected(case.op, args) for case, args in built]

    def work(index: int) -> Callable[[], None]:
        case, args = built[index]

        def run() -> None:
            for _ in range(6):
                after = placed(args, backend.device)
                getattr(ropool, case.op)(**after, backend=backend.name)
                compare(args, after, wanted[index])

        return run

    # Entering clears what is remembered of earlier calls.
    with settings.override(backend=None):
        together([work(index) for index in range(len(cases))])


def test_concurrent_calls_that_share_inputs(backend: Backend) -> None:
    """Four threads write disjoint slots of one pool from one K and V."""
    case = Case(op="store_kv_", tokens=64, pages=16, page_size=16, heads_kv=4)
    args = placed(arguments(case), backend.device)
    pieces = [torch.arange(64) + 64 * part for part in range(4)]

    def work(slots: torch.Tensor) -> Callable[[], None]:
        mine = {**args, "slot_mapping": slots.to(backend.device)}
        return lambda: ropool.store_kv_(**mine, backend=backend.name)

    together([work(slots) for slots in pieces])
    for part in ("k", "v"):
        pool = args[f"{part}_pool"].flatten(0, 1)
        for slots in pieces:
            assert torch.equal(
                pool[slots].view(torch.int16), args[part].contiguous().view(torch.int16)
            )


_FORKS = """
import dataclasses, os, signal, sys, torch, ropool
signal.alarm(60)
from oracle import compare, expected
from ops.backend import BACKENDS
from ops.calls import Case, arguments
from ops.memory import placed
backend = next(b for b in BACKENDS if b.name == sys.argv[1])
case = Case(op="rope_store_kv_", tokens=300, heads_q=32, heads_kv=8, head_dim=64, pages=100)
args = arguments(case)
wanted = expected(case.op, args)
first, third = (placed(args, backend.device) for _ in range(2))
ropool.rope_store_kv_(**first, backend=backend.name)
compare(args, first, wanted)

def forked(generations):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        # PyTorch's own threads do not outlive a fork. A backend must do without its own.
        threads = 1 if backend.name == "reference" else 2
        for args, after, wanted in ragged[generations]:
            torch.set_num_threads(threads)
            ropool.rope_store_kv_(**after, backend=backend.name)
            torch.set_num_threads(1)
            compare(args, after, wanted)
        if generations > 1:
            forked(generations - 1)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "the child failed or hung"

ragged = {1: [], 2: []}
for generation, lengths in ((2, (300, 257, 131)), (1, (300, 193))):
    for length in lengths:
        built = arguments(dataclasses.replace(case, tokens=length))
        ragged[generation].append((built, placed(built, backend.device), expected(case.op, built)))
forked(2)
ropool.rope_store_kv_(**third, backend=backend.name)
compare(args, third, wanted)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use(backend: Backend) -> None:
    """A child has none of the parent's threads: a call must neither hang nor wait for them."""
    if backend.device != "cpu":
        pytest.skip("CUDA cannot be used after a fork")
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, backend.name],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
