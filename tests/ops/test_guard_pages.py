"""No op touches memory past an end of any tensor; the processor watches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ops.backend import Backend

TESTS = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_no_access_past_an_end(backend: Backend) -> None:
    if backend.device != "cpu":
        pytest.skip("guard pages protect host memory")
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "ops.guard_pages", backend.name],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = "\n".join(done.stdout.splitlines()[-2:])
    assert done.returncode == 0 and last.endswith("done"), f"{last}\n{done.stderr[-3000:]}"
