"""clang, from the package `ziglang`: the same one on every machine, whatever compilers it has."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
METAL = HERE.parents[1] / "metal"
KEPT = METAL.parent / "build" / "metal_kernels"
"""The compiled kernels, by the content of what they were compiled from."""

INCLUDE = (HERE / "shim", METAL / "kernels", METAL / "csrc")
SOURCES = (
    *(HERE / "harness.cpp", HERE / "shim" / "metal_stdlib", METAL / "csrc" / "launch.hpp"),
    *(METAL / "kernels" / "rope_pool.metal", METAL / "kernels" / "params.h"),
)
FLAGS = (
    *("-std=c++20", "-O1", "-mcpu=baseline", "-fPIC", "-fno-exceptions", "-ffp-contract=off"),
    # What C++ leaves undefined, such as an address that is no multiple of its type's size, ends
    # the process.
    *("-fsanitize=undefined", "-fsanitize-trap=undefined"),
    # Metal's attributes mean nothing here.
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-attributes"),
)


def missing() -> str | None:
    """Why there is no clang, or `None`."""
    found = importlib.util.find_spec("ziglang") is not None
    return None if found else "the package ziglang is not installed"


def zig(*arguments: str) -> None:
    """Run a compiler of `ziglang`; ends this process where it fails."""
    command = [sys.executable, "-m", "ziglang", *arguments]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        sys.exit(f"exit code {code}: {' '.join(arguments)}")


def build() -> ctypes.CDLL:
    """The `.metal` file with the harness, compiled as C++ unless that was done before."""
    key = hashlib.sha256(repr((metadata.version("ziglang"), FLAGS, sys.platform)).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    library = KEPT / f"{key.hexdigest()[:32]}.so"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if not library.exists():
            _compile(library)
    if sys.platform == "linux":
        ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)  # where the library finds its sines
    return ctypes.CDLL(str(library))


def _compile(library: Path) -> None:
    compiled, linked = KEPT / "harness.o", KEPT / "linked.so"
    include = [f"-I{path}" for path in INCLUDE]
    zig("c++", *FLAGS, *include, "-c", str(HERE / "harness.cpp"), "-o", str(compiled))
    # `zig c++` would first compile a C++ library of its own, for minutes, to link with it.
    if sys.platform == "linux":
        zig("ld.lld", "-shared", str(compiled), "-o", str(linked))
    else:
        subprocess.run(["c++", "-shared", str(compiled), "-o", str(linked)], check=True)
    os.replace(linked, library)
