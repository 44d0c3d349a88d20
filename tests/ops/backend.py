"""The backends under test. A backend joins every op test with one line here."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import NoReturn

import pytest
import torch


@dataclass(frozen=True)
class Backend:
    """A backend under test and the device its tensors live on."""

    name: str
    device: str

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        module = importlib.import_module(f"ropool.backends.{self.name}")
        reason: str | None = module.available()
        return reason


def required_backends() -> set[str]:
    """`ROPOOL_REQUIRE_BACKENDS=cpu`: there, a backend that is missing is a failure, not a skip."""
    return {name for name in os.environ.get("ROPOOL_REQUIRE_BACKENDS", "").split(",") if name}


def compiler_required(name: str) -> bool:
    """Whether `ROPOOL_REQUIRE_COMPILERS` (`nvrtc,triton,clang`) has it."""
    return name in os.environ.get("ROPOOL_REQUIRE_COMPILERS", "").split(",")


def without_compiler(name: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where the compiler is required."""
    if compiler_required(name):
        pytest.fail(f"compiler {name} is required here: {reason}")
    pytest.skip(f"compiler {name}: {reason}")


def gpu() -> str | None:
    """PyTorch's word for the GPU of this machine: `cuda` for NVIDIA and AMD, `xpu` for Intel."""
    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if torch.xpu.is_available() else None


BACKENDS = [
    Backend("reference", "cpu"),
    Backend("cpu", "cpu"),
]
if os.environ.get("TRITON_INTERPRET") == "1":
    # Many times slower than the others, so the whole suite runs only where that was asked for.
    BACKENDS.append(Backend("triton", "cpu"))
elif (GPU := gpu()) is not None and "triton" in required_backends():
    # Each call compiles for half a second.
    BACKENDS.append(Backend("triton", GPU))
if torch.cuda.is_available() and torch.version.hip is None:
    BACKENDS.append(Backend("cuda", "cuda"))


def require(backend: Backend) -> None:
    """Skip the test, or fail it, when the backend cannot run here."""
    reason = backend.missing()
    if reason is None:
        return
    if backend.name in required_backends():
        pytest.fail(f"backend {backend.name} is required here: {reason}")
    pytest.skip(f"backend {backend.name}: {reason}")
