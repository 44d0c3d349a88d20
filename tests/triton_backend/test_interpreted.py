"""The Triton kernels against the oracle, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_backend.machine_code import missing


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("part", ["grid", "random", "fnuz"])
def test_interpreted(part: str) -> None:
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join(entry for entry in (tests, os.environ.get("PYTHONPATH")) if entry)
    done = subprocess.run(
        [sys.executable, "-m", "triton_backend.interpret", part],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("done\n"), done.stdout[-500:] + done.stderr[-3000:]
