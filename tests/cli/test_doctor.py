"""`ropool doctor`: what it reports, and that a failing probe costs only its own line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from ropool import dispatch
from ropool.cli import doctor, probes


def test_report_is_plain_and_complete() -> None:
    found = doctor.report()
    assert json.loads(json.dumps(found)) == found
    ops = {entry["op"] for entry in found["kernels"] if entry["device"] == "cpu"}
    assert ops == set(dispatch.OPS)
    for op in ops:
        rows = [e for e in found["kernels"] if e["op"] == op and e["device"] == "cpu"]
        assert len(rows) == len(dispatch.kernels(op))
        assert [row["chosen"] for row in rows].count(True) == 1
        assert all(row["chosen"] or row["reason"] for row in rows)


def test_machine_facts_are_found_here() -> None:
    unknown = [name for name, value in probes.machine().items() if "unknown" in str(value)]
    assert unknown == []


def test_text_names_every_backend_and_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(argparse.Namespace(json=False)) == 0
    text = capsys.readouterr().out
    for backend in dispatch.backends():
        assert backend.name in text
    for op in dispatch.OPS:
        assert f"reference/{op.rstrip('_')}" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def fail() -> Any:
    raise OSError("the probe broke")


@pytest.mark.parametrize("name", ["cpu_model", "cpu_isa", "cores", "memory_gib", "accelerators"])
def test_a_failing_probe_costs_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, name, fail)
    found = doctor.report()
    broken = [key for key, value in found["machine"].items() if "the probe broke" in str(value)]
    assert len(broken) == 1
    assert len(found["kernels"]) >= len(dispatch.OPS)
    assert "the probe broke" in doctor.as_text(found)


def test_a_failing_backend_costs_its_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(name: str) -> str | None:
        return fail() if name == "cpu" else None

    monkeypatch.setattr(dispatch, "unavailable", unavailable)
    monkeypatch.setattr(dispatch, "explain", lambda *_: fail())
    found = doctor.report()
    states = {entry["backend"]: entry["available"] for entry in found["backends"]}
    assert states["cpu"] is False
    assert states["reference"] is True
    assert all("the probe broke" in entry["reason"] for entry in found["kernels"])
    assert "the probe broke" in doctor.as_text(found)


@pytest.mark.parametrize("compiler", ["g++", None])
def test_missing_cpu_kernels_come_with_the_way_to_get_them(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(probes.shutil, "which", lambda name: compiler == name or None)
    monkeypatch.setattr(dispatch, "unavailable", lambda name: "the extension is missing")
    entry = doctor.backend("cpu")
    assert entry["reason"] == "the extension is missing"
    assert "pip install --force-reinstall" in entry["hint"]
    assert ("apt-get install g++" in entry["hint"]) == (compiler is None)
    assert entry["hint"] in doctor.as_text({**doctor.report(), "backends": [entry]})


def test_the_folder_of_compiled_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None)
    monkeypatch.setenv("ROPOOL_CUDA_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    assert doctor.backend("cuda")["cache"] == f"kept in {tmp_path}"
    tmp_path.chmod(0o755)
    entry = doctor.backend("cuda")
    assert entry["cache"].startswith(f"not kept in {tmp_path}: others can enter it (mode 0755)")
    assert entry["cache"] in doctor.as_text({**doctor.report(), "backends": [entry]})


def test_source_is_the_folder_that_an_editable_installation_came_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str:
            return '{"url": "file:///home/a%20b/ropool", "dir_info": {"editable": true}}'

    monkeypatch.setattr(probes.metadata, "distribution", lambda name: Distribution())
    assert probes.source() == "--editable '/home/a b/ropool'"
