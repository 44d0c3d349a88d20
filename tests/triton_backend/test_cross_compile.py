"""What the AMD and NVIDIA compilers make of the kernels, on a machine with neither GPU."""

from __future__ import annotations

import os
import re

import pytest

from ops.backend import without_compiler
from ops.calls import Case, arguments
from ropool.dispatch.tuning import Choice
from ropool.ops._call import described
from triton_backend.machine_code import (
    PROCESSORS,
    TARGETS,
    VERSION,
    cases_of,
    compile_for,
    missing,
    recorded,
)

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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [54, 96])
@pytest.mark.parametrize("choice", [None, {"warps": 8, "vectors": 1}])
def test_every_thread_of_a_head_has_the_same_sum(
    choice: Choice | None, rotary_dim: int, interleaved: bool
) -> None:
    """What a thread gets from another and adds to its own is no product: the assembler would fuse
    the sum with one thread's product and not with the other's. Where such sums meet in one place
    of shared memory, they race."""
    case = Case(
        tokens=1, head_dim=96, rotary_dim=rotary_dim, interleaved=interleaved,
        dtype="float32", q_norm="model", k_norm="model",
    )  # fmt: skip
    code = ptx_of(case, choice)
    made = {
        result: (operation, operands.split(", "))
        for operation, result, operands in re.findall(r"([a-z][\w.]+)\s+(%\w+), (.*);", code)
    }
    exchanged = {name for name, (operation, _) in made.items() if operation.startswith("shfl")}
    added = [
        (operation, operands)
        for operation, operands in made.values()
        if operation.startswith(("add.", "fma.")) and exchanged & set(operands)
    ]
    assert added
    for operation, operands in added:
        own = {made[name][0] for name in operands if name in made}
        assert operation.startswith("add.") and not any(name.startswith("mul.") for name in own)


def ptx_of(case: Case, choice: Choice | None) -> str:
    """NVIDIA's assembly of the kernel of a call whose tensors start at any address."""
    import triton
    from triton.backends.compiler import GPUTarget

    from ropool.backends.triton import launch
    from ropool.backends.triton.call import describe
    from ropool.backends.triton.plan import plan

    made = described("test", case.op, (), arguments(case))
    key, options = made.key()
    gpu = GPUTarget(*TARGETS["sm_90"])
    cut = plan(key, case.tokens, gpu.warp_size, PROCESSORS, choice)
    call = describe(key, made.tensors, options, cut, True, True)
    source = launch.source(call, made.tensors, False)
    kernel = triton.compile(source, target=gpu, options={"num_warps": call.warps})
    return str(kernel.asm["ptx"])
