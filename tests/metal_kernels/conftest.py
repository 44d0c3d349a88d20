"""The kernels, compiled once for all tests."""

from __future__ import annotations

import ctypes

import pytest

from metal_kernels import compiler
from metal_kernels.harness import load
from ops.backend import without_compiler


@pytest.fixture(scope="session")
def clang() -> None:
    """Skip the test, or fail it, where there is no clang."""
    if (reason := compiler.missing()) is not None:
        without_compiler("clang", reason)


@pytest.fixture(scope="session")
def lib(clang: None) -> ctypes.CDLL:
    return load()
