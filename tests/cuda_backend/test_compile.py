"""Specialisations compile with NVRTC for every architecture, and no worse than they did; no GPU is
needed."""

from __future__ import annotations

import os
import warnings

import pytest

from cuda_backend.machine_code import VERSION, compiled, recorded
from cuda_backend.specialisations import ARCHITECTURES, Specialisation, specialisations
from ops.backend import compiler_required, without_compiler

STACK = 16
"""Bytes; NVRTC keeps a few scalars there for sm_100 and later."""

PARTS = 4
SAMPLE = 8
"""One in so many kernels is compiled although the table has its text."""
ALL = os.environ.get("ROPOOL_COMPILE_ALL") == "1"


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


def test_nothing_spills() -> None:
    assert not [code for code in recorded().values() if code.stack > STACK]


def in_sample(one: Specialisation, arch: str) -> bool:
    """Others for each architecture, and after each change of the kernels."""
    return (int(one.texts, 16) + ARCHITECTURES.index(arch)) % SAMPLE == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_compile_to_what_was_recorded(arch: str, part: int) -> None:
    """A kernel whose text the table has was compiled when it was written there, by this compiler,
    which makes the same of it each time: a sample shows it. All others are compiled here."""
    from ropool.backends.cuda import compile

    same_compiler = compile.compiler_version() == VERSION
    table, wrong, unknown = recorded(), [], 0
    before = {(code.case, code.arch): code for code in table.values()}
    for one in specialisations()[part::PARTS]:
        known = table.get((one.texts, arch)) if same_compiler else None
        unknown += known is None
        here = known is None and compiler_required("nvrtc")
        if not (here or ALL or in_sample(one, arch)):
            continue
        try:
            code = compiled(one, arch)
        except RuntimeError as error:
            wrong.append(f"{one.name} for {arch}: {error}")
            continue
        old = before.get((one.name, arch)) if same_compiler else None
        if known is not None and (code.registers, code.stack) != (known.registers, known.stack):
            wrong.append(f"{code}\n  of the same text the table says {known}")
        elif code.stack > STACK:
            wrong.append(f"{code}: allowed are {STACK} bytes of stack")
        elif old is not None and code.worse_than(old):
            wrong.append(f"{code}\n  was {old}")
    assert not wrong, (
        f"{len(wrong)} kernels do not compile or became worse; if that is meant, run "
        "`python -m cuda_backend.machine_code` in tests/ and commit the table:\n" + "\n".join(wrong)
    )
    if unknown and same_compiler:
        warnings.warn(
            f"{unknown} kernels for {arch} are not in machine_code.csv; to keep CI fast run "
            "`python -m cuda_backend.machine_code` in tests/ and commit the table",
            stacklevel=1,
        )
