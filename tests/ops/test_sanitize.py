"""What `sanitize` makes of a tool's output; a script stands in for compute-sanitizer."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from ops import sanitize

TOOL = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[sys.argv.index({sys.executable!r}) :]
if os.environ.get("REALLY"):
    subprocess.run(command)
else:
    print("====", sum("::" in word for word in command), "passed in 1.00s ====")
print("========= ERROR SUMMARY:", os.environ["FOUND"], "errors")
"""
LAYOUTS = [f"tests/test_layouts.py::test_addresses[NHD-{part}]" for part in "kv"]
LAYOUTS.append("tests/test_layouts.py::test_addresses[HND-k]")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("FOUND", "0")
    monkeypatch.setattr(sanitize, "tests_of", lambda backend, tool: LAYOUTS)
    monkeypatch.setattr(sanitize, "version", lambda: "a tool")


def test_every_test_runs_once(
    tool: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "found.txt"
    given = ["--processes", "2", "--batch", "2", "--out", str(out)]
    assert sanitize.main(["cuda", "racecheck", "synccheck", *given]) == 0
    head, race, sync, end = out.read_text().splitlines()
    assert head == "a tool"
    assert race.startswith("racecheck: 0 errors, 3 tests passed after ")
    assert sync.startswith("synccheck: 0 errors, 3 tests passed after ")
    assert end.startswith("2 processes at once, 2 GPUs, ")
    *progress, _, _, _, _ = capsys.readouterr().out.splitlines()
    assert len(progress) == 4
    assert {re.findall("GPU (.*):", line)[0] for line in progress} <= {"5", "7"}
    assert sum("1 tests not run" in line or "2 tests not run" in line for line in progress) == 2


def test_what_is_found_is_told(tool: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUND", "2")
    monkeypatch.setenv("REALLY", "1")
    out = tmp_path / "found.txt"
    given = ["--processes", "1", "--batch", "3", "--out", str(out)]
    assert sanitize.main(["cuda", "racecheck", *given]) == 1
    assert "racecheck: 2 errors, 3 tests passed" in out.read_text()
    log = out.with_suffix(".log").read_text()
    assert all(test in log for test in LAYOUTS)
    assert "ERROR SUMMARY: 2 errors" in log


def test_no_batch_begins_after_the_time(tool: None, tmp_path: Path) -> None:
    out = tmp_path / "found.txt"
    assert sanitize.main(["cuda", "memcheck", "--minutes", "0", "--out", str(out)]) == 1
    _, control, line, _ = out.read_text().splitlines()
    assert control == "memcheck, planted fault: not run"
    assert line == "memcheck: 0 errors, 3 tests not run"


def test_a_planted_fault_must_be_seen(tool: None, tmp_path: Path) -> None:
    out = tmp_path / "found.txt"
    assert sanitize.main(["cuda", "initcheck", "--batch", "3", "--out", str(out)]) == 1
    assert "initcheck, planted fault: not seen\n" in out.read_text()
    assert "initcheck: 0 errors, 3 tests passed" in out.read_text()


def test_what_runs_together() -> None:
    """Tests for two GPUs apart from the others; the largest one after another, in one process."""
    two = [f"{sanitize.TWO_GPUS[0]}::test_{i}" for i in range(3)]
    large = [f"test_gpu.py::test_{sanitize.LARGE}[{i}]" for i in range(3)]
    long = [f"{sanitize.LONG}.py::test[{i}]" for i in range(2)]
    others = [f"test_others.py::test[{i}]" for i in range(5)]
    cut = sanitize.batches("memcheck", [*others, *two, *large, *long], 2)
    assert [(list(batch.tests), batch.gpus) for batch in cut] == [
        (large, 1),
        (long[:1], 1),
        (long[1:], 1),
        (two[::2], 2),
        (two[1::2], 2),
        (others[::3], 1),
        (others[1::3], 1),
        (others[2::3], 1),
    ]


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
    outcome = sanitize.read(f"....\n==== {line} ====\n========= ERROR SUMMARY: 0 errors\n")
    assert (outcome.tests, outcome.clean) == (Counter(tests), clean)
