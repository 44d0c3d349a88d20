"""Specialisations compile with NVRTC for every architecture, without spills; no GPU is needed."""

from __future__ import annotations

import functools
import os

import pytest

from cuda_backend.specialisations import (
    ARCHITECTURES,
    Bound,
    grid_calls,
    model_calls,
    resources,
    source,
)

models, grid = functools.cache(model_calls), functools.cache(grid_calls)
REGISTERS = 80
"""So many that enough blocks fit a multiprocessor to hide the latency of memory."""
STACK = 16
"""Bytes; NVRTC keeps a few scalars there for sm_100 and later."""

# All of the grid takes minutes; each architecture gets another part of it.
EVERY = 1 if os.environ.get("ROPOOL_COMPILE_ALL") == "1" else 24


@pytest.fixture(autouse=True)
def needs_compiler() -> None:
    pytest.importorskip("cuda.core", reason="cuda.core is not installed")
    from ropool.backends.cuda import compile

    try:
        compile.compiler_version()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"NVRTC is not installed: {error}")


def build(call: Bound, arch: str, align: int = 16) -> dict[str, int]:
    from ropool.backends.cuda import compile

    return resources(compile.compile_cubin(source(call, arch, align), arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("part", range(4))
def test_kernels_of_models_have_no_spills(arch: str, part: int) -> None:
    for name in list(models())[part :: 4 * min(EVERY, 3)]:
        found = build(models()[name], arch)
        assert found["stack"] <= STACK, (name, found)
        assert found["registers"] <= REGISTERS, (name, found)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("align", [16, 4, 1])
def test_kernels_of_the_grid_compile(arch: str, align: int) -> None:
    start = ARCHITECTURES.index(arch) * 7 + align
    for name in list(grid())[start % EVERY :: EVERY]:
        assert build(grid()[name], arch, align)["registers"] > 0, name
