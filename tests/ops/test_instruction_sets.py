"""The cpu backend on each instruction set of this machine but the one that all other tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ops.backend import BACKENDS, require

HERE = Path(__file__).parent
FILES = [HERE / "test_grid.py", *sorted(HERE.glob("test_hazard_*.py"))]
NAMES = ["scalar", "neon", "avx2", "avx512"]


@pytest.mark.parametrize("name", NAMES)
def test_instruction_set(name: str) -> None:
    backend = next(backend for backend in BACKENDS if backend.name == "cpu")
    require(backend)
    from ropool.backends.cpu import isa

    report = isa()
    if name not in report["available"]:
        pytest.skip(f"this machine or build has no {name}")
    if name == report["chosen"]:
        pytest.skip(f"{name} is what the other tests run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "cpu", *map(str, FILES)],
        env={**os.environ, "ROPOOL_CPU_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
