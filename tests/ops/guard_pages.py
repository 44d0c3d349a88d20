"""Runs the grids with every tensor ending, then starting, at memory that is not mapped.

A script, since a read or write past a tensor ends the process:
python -m ops.guard_pages BACKEND
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys

import torch

import ropool
from ops import grids
from ops.backend import BACKENDS
from ops.calls import Args, arguments
from ops.memory import compacted
from oracle import compare, expected
from oracle.compare import tensors_of

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ_WRITE = 0, 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Fence:
    """A copy of a view in memory of its own, between two pages that must not be touched."""

    def __init__(self, view: torch.Tensor, at_end: bool) -> None:
        size = view.element_size()
        extent = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
        pages = -(-extent * size // PAGE)
        self.map = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = torch.frombuffer(self.map, dtype=torch.uint8)
        start = PAGE + (pages * PAGE - extent * size if at_end else 0)
        elements = whole[start : start + extent * size].view(view.dtype)
        self.view = elements.as_strided(view.shape, view.stride(), elements.storage_offset())
        self.view.copy_(view)
        self.ends = [whole.data_ptr(), whole.data_ptr() + (pages + 1) * PAGE]
        self._protect(PROT_NONE)

    def _protect(self, access: int) -> None:
        for address in self.ends:
            if _libc.mprotect(address, PAGE, access) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def release(self) -> torch.Tensor:
        self._protect(PROT_READ_WRITE)
        return self.view


def run(op: str, args: Args, backend: str, at_end: bool) -> None:
    fences = {n: Fence(t, at_end) for n, t in tensors_of(args).items() if t.numel() > 0}
    after = {**args, **{name: fence.view for name, fence in fences.items()}}
    getattr(ropool, op)(**after, backend=backend)
    results = {**after, **{name: fence.release() for name, fence in fences.items()}}
    plain = compacted(args)
    compare(plain, compacted(results), expected(op, plain))


def main(backend: str) -> None:
    faulthandler.enable()
    assert backend in {known.name for known in BACKENDS}
    cases = [
        *grids.rope_cases(),
        *grids.rope_store_kv_cases(),
        *grids.store_kv_cases(),
        *grids.store_mla_cases(),
        *grids.rope_store_mla_cases(),
    ]
    if backend == "reference":
        # Plain torch has no loads and stores of its own to go astray.
        cases = cases[::5]
    for number, case in enumerate(cases):
        args = arguments(case)
        # What runs on past an end is common, what starts too early is rare.
        for at_end in (True, False) if number % 3 == 0 else (True,):
            print(f"{'end' if at_end else 'start'} of {case}", flush=True)
            run(case.op, args, backend, at_end)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
