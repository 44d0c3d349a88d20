"""What is packed, and that an installation without a compiler works and says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core")
pytest.importorskip("nanobind")

ROOT = Path(__file__).parents[2]
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def call(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    call(f"import scikit_build_core.build as b; b.build_sdist({str(folder)!r})", ROOT)
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def fallback_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist where no compiler is found."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    [unpacked] = source.iterdir()
    code = f"import scikit_build_core.build as b; b.build_wheel({str(folder)!r})"
    call(code, unpacked, **NO_COMPILER)
    [path] = folder.iterdir()
    return path


def test_sdist_holds_what_builds_and_tests_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} <= names
    assert {"src/ropool/py.typed", "tests/conftest.py", "constraints.txt"} <= names
    assert any(name.startswith("csrc/") and name.endswith(".cpp") for name in names)
    unwanted = (".so", ".pyc", ".o")
    assert [name for name in names if name.endswith(unwanted) or name.startswith(".")] == []


def test_wheel_without_a_compiler_is_pure_python(fallback_wheel: Path) -> None:
    assert fallback_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(fallback_wheel) as archive:
        names = set(archive.namelist())
    assert {"ropool/__init__.py", "ropool/py.typed", "ropool/cli/main.py"} <= names
    assert [name for name in names if name.endswith((".so", ".cpp", ".hpp"))] == []


def test_installation_without_a_compiler_runs_and_says_why(
    fallback_wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(fallback_wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        # An editable installation of this very checkout would come first.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        "import torch, ropool\n"
        "assert ropool.__file__.startswith(sys.argv[1]), ropool.__file__\n"
        "q, k = torch.ones(2, 4, 8), torch.ones(2, 1, 8)\n"
        "ropool.rope_(q, k, torch.rand(4, 8), torch.arange(2))\n"
        "assert ropool.dispatch.chosen == {'rope_': 'reference/rope'}\n"
        "from ropool.cli.main import main\n"
        "raise SystemExit(main(['doctor', '--json']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    [cpu] = [entry for entry in found["backends"] if entry["backend"] == "cpu"]
    assert cpu["available"] is False
    assert cpu["reason"]
    assert "pip install" in cpu["hint"]
    for entry in found["kernels"]:
        if entry["device"] != "mlx":  # arrays of MLX have kernels of their own
            assert entry["chosen"] == entry["kernel"].startswith("reference/")
