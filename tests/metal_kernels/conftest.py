"""The kernels, compiled once for all tests."""

from __future__ import annotations

import ctypes

import pytest

from metal_kernels.harness import build


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("kernels"))
