"""Imports point downwards only, and a backend never imports another: read from the sources, so that
lazy imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "ropool"
LEVELS = (
    {"layouts", "errors"},
    {"backends"},
    {"dispatch"},
    {"ops", "rotary", "kvcache"},
    {"integrations", "engine", "mlx", "bench", "cli"},
)
"""The parts from the lowest to the highest; a part imports itself and what stands lower, and those
of the top level each other."""

BELOW_ANY = {"dispatch.key", "dispatch.spec", "dispatch.cache", "dispatch.tuning"}
"""The interface between ops and kernels: plain records, which backends read too."""

SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]


def imported(path: Path) -> set[str]:
    """The modules of ropool that a file imports, without the leading `ropool.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("ropool.") for name in names if name.startswith("ropool.")}
    return found


def level(part: str) -> int | None:
    return next((i for i, parts in enumerate(LEVELS) if part in parts), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts
    own = level(here[0])
    assert own is not None, f"{here[0]} has no level"
    for name in imported(path):
        target = name.split(".")
        if ".".join(target[:2]) in BELOW_ANY or level(target[0]) is None:
            continue
        allowed = target[0] == here[0] or level(target[0]) < own or own == len(LEVELS) - 1
        assert allowed, f"{path} imports ropool.{name}"
        if here[0] == target[0] == "backends":
            assert target[1] == here[1], f"{path} imports another backend: ropool.{name}"


def test_importing_ropool_imports_no_backend() -> None:
    script = (
        "import sys, ropool\n"
        "print([name for name in sys.modules if name.startswith('ropool.backends.')],"
        " [name for name in ('transformers', 'gguf', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] []"


def test_no_test_folder_hides_a_package() -> None:
    # pytest puts tests/ on the path, where even an empty folder counts as an importable package:
    # with tests/triton, PyTorch believes that Triton is installed.
    tests = Path(__file__).parents[1]
    folders = {path.name for path in tests.iterdir() if path.is_dir()}
    hidden = {"cuda", "mlx", "numpy", "packaging", "torch", "transformers", "triton"}
    assert not folders & hidden, "name it after what is tested, such as triton_backend"
