"""What `sanitize` makes of a tool's output; a script stands in for compute-sanitizer."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from ops import sanitize

TOOL = f"""#!{sys.executable}
import subprocess, sys
subprocess.run(sys.argv[sys.argv.index({sys.executable!r}) :])
print("========= ERROR SUMMARY: 3 errors")
"""


def test_a_tool_runs_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    command = sanitize.pytest("tests/test_layouts.py")
    outcome = sanitize.read(sanitize.under("memcheck", "cuda", command))
    assert set(outcome.tests) == {"passed"}
    assert (outcome.errors, outcome.clean) == (3, False)


@pytest.mark.parametrize(
    ("end", "errors", "clean"),
    [
        ("ERROR SUMMARY: 0 errors", 0, True),
        ("ERROR SUMMARY: 1 error", 1, False),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 2, False),
        ("Internal error", None, False),
    ],
)
def test_what_a_tool_found(end: str, errors: int | None, clean: bool) -> None:
    outcome = sanitize.read(f"9 passed in 1.00s\n========= {end}\n")
    assert (outcome.errors, outcome.clean) == (errors, clean)


@pytest.mark.parametrize(
    ("line", "tests", "clean"),
    [
        ("19 passed, 68 deselected in 27.69s", {"passed": 19}, True),
        ("2 passed, 1 skipped in 61.00s (0:01:01)", {"passed": 2, "skipped": 1}, True),
        ("1 failed, 2 passed in 1.00s", {"failed": 1, "passed": 2}, False),
        ("3 passed, 1 error in 1.00s", {"passed": 3, "error": 1}, False),
        ("no tests ran in 0.01s", {}, False),
    ],
)
def test_which_tests_passed(line: str, tests: dict[str, int], clean: bool) -> None:
    outcome = sanitize.read(f"....\n{line}\n========= ERROR SUMMARY: 0 errors\n")
    assert (outcome.tests, outcome.clean) == (Counter(tests), clean)
