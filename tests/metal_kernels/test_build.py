"""The checks before `ropool-metal` is built, and the cache of compiled shaders, with a stand-in for
`xcrun`."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metal_kernels.compiler import METAL

CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake")

VERSION = re.search(r'MLX_VERSION = "(.*)"', (METAL / "src/ropool_metal/_version.py").read_text())
assert VERSION is not None
MLX = VERSION[1]

PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(check LANGUAGES NONE)
set(APPLE {apple})
set(CMAKE_SYSTEM_NAME {system})
set(CMAKE_SYSTEM_PROCESSOR {processor})
include("{metal}/cmake/check_machine.cmake")
ropool_check_machine("{mlx}")
if(ROPOOL_HAVE_METAL)
  message(STATUS "compiles ahead of time")
  include("{metal}/cmake/metallib.cmake")
  ropool_add_metallib()
endif()
"""

XCRUN = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
  *--find*) exit {find} ;;
  *--version*) echo "Apple metal version 32"; exit {runs} ;;
esac
while [ "$1" != -o ]; do shift; done
echo built > "$2"
"""


class Machine:
    """A Mac, as far as the build asks about it."""

    def __init__(self, folder: Path, *, find: int = 0, runs: int = 0) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir()
        xcrun = folder / "bin" / "xcrun"
        xcrun.write_text(XCRUN.format(log=self.log, find=find, runs=runs))
        xcrun.chmod(0o755)
        shutil.copytree(METAL / "kernels", folder / "kernels")

    def configure(
        self,
        build: str = "build",
        *,
        apple: str = "ON",
        system: str = "Darwin",
        processor: str = "arm64",
        mlx: str = MLX,
        **environment: str,
    ) -> tuple[int, str]:
        """Exit code and output of a configuration."""
        text = PROJECT.format(
            apple=apple, system=system, processor=processor, mlx=mlx, metal=METAL.as_posix()
        )
        (self.folder / "CMakeLists.txt").write_text(text)
        assert CMAKE is not None
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        home = {"XDG_CACHE_HOME": str(self.folder / "cache"), "PATH": path}
        done = subprocess.run(
            [CMAKE, "-S", str(self.folder), "-B", str(self.folder / build)],
            env={**os.environ, **home, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    @property
    def compilations(self) -> int:
        """How often a shader was compiled."""
        return self.log.read_text().count("rope_pool.metal -o")


FAILURES = {
    "another mlx": ({"mlx": "0.31.0"}, f"found 0.31.0: pip install mlx=={MLX}"),
    "another system": (
        {"apple": "OFF", "system": "Windows"},
        "not for Windows: pip install ropool",
    ),
    "Intel": ({"processor": "x86_64"}, "arch -arm64 python3 -m pip install ./metal"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_is_one_line(name: str, tmp_path: Path) -> None:
    changes, message = FAILURES[name]
    code, output = Machine(tmp_path).configure(**changes)
    assert code != 0
    assert [line for line in output.splitlines() if message in line], output


@pytest.mark.parametrize(
    "find, runs, message",
    [
        (1, 1, "install Xcode from the App Store, then sudo xcode-select -s"),
        (0, 1, "xcodebuild -downloadComponent MetalToolchain"),
    ],
)
def test_without_the_toolchain(find: int, runs: int, message: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, find=find, runs=runs)
    code, output = machine.configure()
    assert code == 0 and "compiled at run time" in output
    assert [line for line in output.splitlines() if message in line], output
    code, output = machine.configure(CIBUILDWHEEL="1")
    assert code != 0  # a wheel for others brings its kernels compiled
    assert [line for line in output.splitlines() if message in line], output


def test_linux_asks_for_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, find=1, runs=1)
    code, output = machine.configure(apple="OFF", system="Linux", processor="x86_64")
    assert code == 0 and "ahead of time" not in output and not machine.log.exists()


def test_a_shader_is_compiled_once_for_its_content(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    code, output = machine.configure("first")
    assert code == 0 and "compiles ahead of time" in output, output
    assert machine.configure("second")[0] == 0
    assert machine.compilations == 1
    with (tmp_path / "kernels" / "params.h").open("a") as file:
        file.write("// changed\n")
    assert machine.configure("second")[0] == 0
    assert machine.compilations == 2
    compiled = [line for line in machine.log.read_text().splitlines() if " -o " in line]
    assert all("-mmacosx-version-min=14.0" in line for line in compiled)
    assert all("-fno-fast-math" in line for line in compiled)


def test_ccache_compiles_where_there_is_one(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    pytest.importorskip("nanobind")
    ccache = tmp_path / "bin" / "ccache"
    ccache.parent.mkdir()
    ccache.write_text('#!/bin/sh\nexec "$@"\n')
    ccache.chmod(0o755)
    path = f"{ccache.parent}{os.pathsep}{os.environ['PATH']}"
    options = ["-G", "Unix Makefiles", f"-DPython_EXECUTABLE={sys.executable}"]
    # Nothing is compiled, so that the kernels of the cpu backend need not be there.
    options.append(f"-DROPOOL_CPU_CORE={tmp_path / 'core.a'}")
    assert CMAKE is not None
    done = subprocess.run(
        [CMAKE, "-S", str(METAL), "-B", str(tmp_path / "build"), *options],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "build" / "CMakeFiles" / "_ext.dir" / "build.make").read_text()
    compiled = [line for line in commands.splitlines() if " -c " in line]
    assert len(compiled) == 4 and all(f"\t{ccache} " in line for line in compiled)


def test_the_sources_can_be_joined() -> None:
    """Where there is no metallib the host code puts the header in place of the one line that
    includes it."""
    kernels = (METAL / "kernels" / "rope_pool.metal").read_text()
    host = (METAL / "csrc" / "eval_gpu.cpp").read_text()
    assert kernels.count('#include "params.h"') == kernels.count('#include "') == 1
    assert (METAL / "kernels" / "params.h").read_text().count("#pragma once") == 1
    assert r'"#include \"params.h\""' in host and '"#pragma once"' in host


def load_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("scikit_build_core")
    monkeypatch.chdir(METAL)
    monkeypatch.syspath_prepend(METAL / "build_backend")
    monkeypatch.delitem(sys.modules, "backend", raising=False)
    return importlib.import_module("backend")


@pytest.mark.parametrize(
    "system, processor, message",
    [
        ("Darwin", "x86_64", "arch -arm64 python3 -m pip install ./metal"),
        ("Windows", "AMD64", "not for Windows: pip install ropool"),
    ],
)
def test_the_machine_is_looked_at_before_pip_looks_for_mlx(
    system: str, processor: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load_backend(monkeypatch)
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: processor)
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        backend.get_requires_for_build_wheel()
    assert "\n" not in str(caught.value)


def test_the_build_asks_for_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load_backend(monkeypatch)
    needed = backend.get_requires_for_build_wheel()
    assert any(requirement.endswith(f"=={MLX}") for requirement in needed)
    assert "nanobind==3.1.0" in needed and callable(backend.build_wheel)


@pytest.mark.parametrize("hook", ["build_sdist", "get_requires_for_build_sdist"])
def test_there_is_no_sdist(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lack the C++ kernels, which stand beside this folder."""
    backend = load_backend(monkeypatch)
    with pytest.raises(SystemExit, match=r"there is no sdist: pip install \./metal") as caught:
        getattr(backend, hook)(*(["dist"] if hook == "build_sdist" else []))
    assert "\n" not in str(caught.value)


def test_the_versions_agree() -> None:
    """The release of MLX stands in many places, and each must say the same."""
    project = (METAL / "pyproject.toml").read_text()
    constraints = (METAL.parent / "constraints.txt").read_text()
    assert set(re.findall(r"mlx(?:\[cpu\])?==([\d.]+)", project)) == {MLX}
    assert f"\nmlx=={MLX}\n" in constraints
    assert f"set(ROPOOL_MLX_VERSION {MLX})" in (METAL / "cmake/check_machine.cmake").read_text()
