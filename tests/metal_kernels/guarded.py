"""Runs random calls with every buffer ending, then starting, at memory that must not be touched.

A script, since a read outside of a buffer ends the process: python -m metal_kernels.guarded
"""

from __future__ import annotations

import faulthandler
import random

from metal_kernels.cases import check, random_call
from metal_kernels.harness import DTYPES, KERNELS, load, run
from ops.guard_pages import Fence


def main() -> None:
    faulthandler.enable()
    lib = load()
    rng = random.Random(1)
    for number in range(8 * len(KERNELS) * len(DTYPES)):
        call = random_call(KERNELS[number % 5], DTYPES[number % 3], rng)
        before = {name: tensor.clone() for name, tensor in call.tensors.items()}
        fences = {n: Fence(t, at_end=number % 4 > 0) for n, t in call.tensors.items()}
        call.tensors = {name: fence.view for name, fence in fences.items()}
        print(f"{number} {call.kernel}", flush=True)
        assert run(lib, call) == 0
        call.tensors = {name: fence.release() for name, fence in fences.items()}
        check(call, before)
    print("done")


if __name__ == "__main__":
    main()
