"""The Triton kernels against the oracle, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from triton_backend.machine_code import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TESTS = Path(__file__).parents[1]
HAZARDS = ("test_hazard_tokens", "test_large_addresses")
"""Of the op suite: padding, window maps, positions and indices of every kind; 64-bit addresses."""


def interpreted(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in (str(TESTS), os.environ.get("PYTHONPATH")) if entry)
    return subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("part", ["grid", "random", "fnuz"])
def test_interpreted(part: str) -> None:
    done = interpreted("triton_backend.interpret", part)
    assert done.stdout.endswith("done\n"), done.stdout[-500:] + done.stderr[-3000:]


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards_interpreted(name: str) -> None:
    file = str(TESTS / "ops" / f"{name}.py")
    plugins = ("-p", "no:cacheprovider", "-p", "triton_backend.interpreter")
    done = interpreted("pytest", "-q", *plugins, "-k", "triton", file)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1]), done.stdout[-500:]
