"""Runs the kernels in Triton's interpreter and compares them with the float64 oracle.

A script, since Triton decides on import whether it interprets. Usage:
TRITON_INTERPRET=1 python -m triton_backend.interpret grid|random|fnuz
"""

from __future__ import annotations

import sys
import warnings

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

import triton_backend.interpreter  # noqa: F401
from ops import grids
from ops.backend import Backend
from ops.calls import FNUZ, check
from ops.test_hazard_fp8 import (
    test_every_half_value_in_fp8,
    test_float32_next_to_every_tie,
)
from ops.test_random_calls import OPS, cases

TRITON = Backend("triton", "cpu")
RANDOM_CALLS = 80
"""`TRITON_INTERPRET=1 pytest tests/ops -k triton` runs everything, in half an hour."""


def grid() -> None:
    """Every second case of the pairwise grids, which is most values of every option."""
    for case in grids.half_of_all():
        print(case, flush=True)
        check(case, TRITON)


def random() -> None:
    """Whole calls drawn by hypothesis."""

    @settings(max_examples=RANDOM_CALLS, derandomize=True, database=None, deadline=None)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        check(data.draw(st.sampled_from(OPS).flatmap(cases)), TRITON)

    run()


def fnuz() -> None:
    """The FNUZ encodings of gfx942: every half value, every tie, and calls of the grids."""
    for stored in FNUZ:
        test_every_half_value_in_fp8(torch.float16, stored, None, TRITON)
        test_float32_next_to_every_tie(stored, TRITON)
    for case in grids.fnuz_cases()[::2]:
        print(case, flush=True)
        check(case, TRITON)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # NumPy's, of NaN and overflow
    {"grid": grid, "random": random, "fnuz": fnuz}[sys.argv[1]]()
    print("done")
