"""Specialisations compile with NVRTC for every architecture, and no worse than they did; no GPU is
needed."""

from __future__ import annotations

import os

import pytest

from cuda_backend.machine_code import VERSION, compiled, recorded, resources
from cuda_backend.specialisations import ARCHITECTURES, grid_calls, model_calls, source
from ops.backend import without_compiler

STACK = 16
"""Bytes; NVRTC keeps a few scalars there for sm_100 and later."""

PARTS = 4
# All of the grid takes minutes; by default each architecture and alignment gets another part of it.
EVERY = 1 if os.environ.get("ROPOOL_COMPILE_ALL") == "1" else 8


@pytest.fixture(autouse=True)
def needs_compiler() -> None:
    from ropool.backends.cuda import compile

    try:
        import cuda.core  # noqa: F401

        compile.compiler_version()
    except (ImportError, RuntimeError) as error:
        without_compiler("nvrtc", f"cuda.core and NVRTC are not installed: {error}")


def test_the_compiler_is_the_one_that_made_the_table() -> None:
    """With another, registers and stack are not compared below."""
    from ropool.backends.cuda import compile

    if (here := compile.compiler_version()) != VERSION:
        without_compiler("nvrtc", f"NVRTC is {here}, machine_code.csv was made with {VERSION}")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_of_models_are_no_worse_than_recorded(arch: str, part: int) -> None:
    from ropool.backends.cuda import compile

    table, worse = recorded(), []
    for case in list(model_calls())[part::PARTS]:
        code, before = compiled(case, arch), table[case, arch]
        assert code.stack <= STACK, code
        if compile.compiler_version() == VERSION and code.worse_than(before):
            worse.append(f"{code}\n  was {before}")
    assert not worse, (
        "machine code is worse than recorded; if that is meant, run "
        "`python -m cuda_backend.machine_code` in tests/ and commit the table:\n" + "\n".join(worse)
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("align", [16, 4, 1])
def test_kernels_of_the_grid_compile(arch: str, align: int) -> None:
    from ropool.backends.cuda import compile

    start = ARCHITECTURES.index(arch) * 7 + align
    texts = {
        source(call, arch, align) for call in list(grid_calls().values())[start % EVERY :: EVERY]
    }
    for text in texts:
        assert resources(compile.compile_cubin(text, arch))["registers"] > 0
