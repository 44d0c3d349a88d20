"""Runs the kernels in Triton's interpreter and compares them with the float64 oracle.

A script, since Triton decides on import whether it interprets. Usage:
TRITON_INTERPRET=1 python -m triton_backend.interpret grid|random|fnuz
"""

from __future__ import annotations

import sys
import warnings

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings

import ropool
from ops import grids
from ops.backend import Backend
from ops.calls import check
from ops.test_random_calls import OPS, cases

TRITON = Backend("triton", "cpu")
RANDOM_CALLS = 80
"""`TRITON_INTERPRET=1 pytest tests/ops -k triton` runs everything, in half an hour."""


def grid() -> None:
    """Every second case of the pairwise grids, which is most values of every option."""
    chosen = [
        *grids.rope_cases()[::2],
        *grids.rope_store_kv_cases()[::2],
        *grids.store_kv_cases()[::2],
        *grids.store_mla_cases()[::2],
        *grids.rope_store_mla_cases()[::2],
    ]
    for case in chosen:
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
    """The FNUZ encodings of gfx942, which the oracle does not know: each code's value, the midpoint
    to the next and both neighbours of that go to the nearest value, ties to the even code."""
    for dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        codes = torch.arange(128, dtype=torch.uint8)
        values = codes.view(dtype).double().numpy()
        middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
        inputs = np.concatenate(
            [
                values.astype(np.float32),
                middle,
                np.nextafter(middle, np.float32(0)),
                np.nextafter(middle, np.float32(np.inf)),
                np.array([values[-1] * 2, 1e38, np.inf, 1e-30, 0.0], dtype=np.float32),
            ]
        )
        inputs = np.concatenate([inputs, -inputs, [np.float32(np.nan)]])
        inputs = np.resize(inputs, (len(inputs) + 15) // 16 * 16)
        k = torch.from_numpy(inputs).view(-1, 1, 16)
        pools = [torch.zeros(k.shape, dtype=torch.uint8).view(dtype) for _ in range(2)]
        ropool.store_kv_(k, k, *pools, torch.arange(len(k)), layout="slots", backend=TRITON.name)
        for pool in pools:
            np.testing.assert_array_equal(
                pool.view(torch.uint8).reshape(-1), nearest(inputs, values)
            )


def nearest(inputs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The code of the nearest of `values`, the positive ones in the order of their codes."""
    codes = np.zeros(len(inputs), dtype=np.uint8)
    for i, x in enumerate(inputs):
        if np.isnan(x):
            codes[i] = 0x80
            continue
        distance = np.abs(values - min(abs(float(x)), values[-1]))
        best = np.flatnonzero(distance == distance.min())
        code = int(best[best % 2 == 0][0] if len(best) > 1 else best[0])
        # There is one zero; what would be -0 is NaN.
        codes[i] = code | (0x80 if x < 0 and code else 0)
    return codes


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # NumPy's, of NaN and overflow
    {"grid": grid, "random": random, "fnuz": fnuz}[sys.argv[1]]()
    print("done")
