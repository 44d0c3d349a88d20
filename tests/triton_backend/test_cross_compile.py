"""What the AMD and NVIDIA compilers make of the kernels, on a machine with neither GPU."""

from __future__ import annotations

import os

import pytest

from ops.backend import without_compiler
from triton_backend.machine_code import TARGETS, VERSION, cases_of, compile_for, missing, recorded

pytestmark = [
    pytest.mark.cross_compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]


@pytest.fixture(autouse=True)
def needs_compiler() -> None:
    if (reason := missing()) is not None:
        without_compiler("triton", reason)


def test_the_compiler_is_the_one_that_made_the_table() -> None:
    """With another, registers, shared memory and widths are not compared below."""
    import triton

    if (here := triton.__version__) != VERSION:
        without_compiler("triton", f"Triton is {here}, machine_code.csv was made with {VERSION}")


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code(target: str) -> None:
    """No spills, rows of large calls stored 16 bytes a thread, and no worse than the table says."""
    import triton

    table = recorded()
    worse = []
    for case in cases_of(target):
        code, before = compile_for(case, target), table[case, target]
        assert code.spilled == 0, code
        assert code.wide_loads > 0, code
        # In smaller pieces are stored the four scales of a 656-byte row, and the halves of the
        # heads where few tokens are spread over many threads.
        assert code.narrow_stores <= 4 * ("few tokens" in case) + ("656 bytes" in case), code
        if triton.__version__ == VERSION and (
            code.registers > before.registers
            or code.shared_bytes > before.shared_bytes
            or code.wide_loads < before.wide_loads
            or code.wide_stores < before.wide_stores
        ):
            worse.append(f"{code}\n  was {before}")
    assert not worse, (
        "machine code is worse than recorded; if that is meant, run "
        "`python -m triton_backend.machine_code` in tests/ and commit the table:\n"
        + "\n".join(worse)
    )
