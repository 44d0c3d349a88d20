"""The kernels' reciprocal and quotient, which call no subroutine, against divisions: their text is
compiled for this machine, with a division in place of the one instruction that it does not have."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ops.backend import without_compiler
from ropool.backends.cuda import compile

HARNESS = """
#include <cmath>
#define DEVICE static
#define fabsf std::fabs
#define fmaf std::fma
static int nudge;
// Its error is at most one unit in the last place, and numbers that are not normal are zeros to it.
static float reciprocal(float x) {{
  if (std::fpclassify(x) == FP_SUBNORMAL) x = std::copysign(0.0f, x);
  const float exact = 1.0f / x;
  if (std::fpclassify(exact) == FP_SUBNORMAL) return std::copysign(0.0f, exact);
  if (nudge == 0 || exact == 0.0f || std::isinf(exact)) return exact;
  return std::nextafter(exact, nudge > 0 ? INFINITY : -INFINITY);
}}
{text}
extern "C" void inverses(const float* x, float* to, long count, int units) {{
  nudge = units;
  for (long i = 0; i < count; ++i) to[i] = inverse_of(x[i]);
}}
extern "C" void quotients(const float* x, const float* by, float* to, long count, int units) {{
  nudge = units;
  for (long i = 0; i < count; ++i) to[i] = divided(x[i], by[i], inverse_of(by[i]));
}}
"""
NUDGES = [-1, 0, 1]
LARGEST = torch.finfo(torch.float32).max
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -LARGEST, LARGEST]
Compiled = Callable[..., Tensor]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`compiled(name, nudge, *tensors)`."""
    compiler = shutil.which("c++")
    if compiler is None:
        without_compiler("c++", "there is none")
    text = compile.source("formats.cuh")
    text = text[
        text.index("DEVICE float inverse_of") : text.index("template <int N> DEVICE void divide_by")
    ]
    text, replaced = re.subn(
        r'asm\("rcp\.approx\.ftz\.f32 %0, %1;" : "=f"\((\w+)\) : "f"\((\w+)\)\);',
        r"\1 = reciprocal(\2);",
        text,
    )
    assert replaced == 1
    folder: Path = tmp_path_factory.mktemp("arithmetic")
    (folder / "harness.cpp").write_text(HARNESS.format(text=text))
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(
        [compiler, *options, str(folder / "harness.cpp"), "-o", str(folder / "harness.so")],
        check=True,
    )
    library = ctypes.CDLL(str(folder / "harness.so"))

    def call(name: str, nudge: int, *tensors: Tensor) -> Tensor:
        found = torch.empty_like(tensors[0])
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, found)]
        getattr(library, name)(*addresses, ctypes.c_long(found.numel()), nudge)
        return found

    return call


def floats(exponents: range, mantissas: Tensor) -> Tensor:
    """Positive float32 with these biased exponents and mantissas."""
    bits = torch.tensor(list(exponents), dtype=torch.int32)[:, None] << 23 | mantissas
    return bits.flatten().view(torch.float32)


def some_mantissas() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(0, 1 << 23, (2000,), generator=generator, dtype=torch.int32)
    return torch.cat([some, torch.tensor([0, 1, 1 << 22, (1 << 23) - 1], dtype=torch.int32)])


def different(found: Tensor, wanted: Tensor) -> Tensor:
    same = (found == wanted) & (found.signbit() == wanted.signbit())
    return ~(same | (found.isnan() & wanted.isnan()))


def test_an_inverse_is_that_of_a_division(compiled: Compiled) -> None:
    """Up to 2^126, where the result is normal."""
    all_of_one = floats(range(127, 128), torch.arange(1 << 23, dtype=torch.int32))
    all_sizes = floats(range(253), some_mantissas())
    special = torch.tensor(SPECIAL[:-2])  # without the largest
    for x in (all_of_one, -all_of_one, all_sizes, -all_sizes, special):
        wrong = x[different(compiled("inverses", 0, x), 1 / x)]
        assert wrong.numel() == 0, wrong[:8].tolist()


@pytest.mark.parametrize("nudge", NUDGES)
def test_an_inverse_is_near_whatever_the_instruction_says(compiled: Compiled, nudge: int) -> None:
    x = floats(range(255), some_mantissas())
    found, wanted = compiled("inverses", nudge, x), 1 / x
    # Neighbours differ by one as integers.
    apart = (found.view(torch.int32).long() - wanted.view(torch.int32)).abs()
    assert int(apart.max()) <= 1
    powers = floats(range(1, 255), torch.zeros(1, dtype=torch.int32))
    assert not different(compiled("inverses", nudge, powers), 1 / powers).any()


@pytest.mark.parametrize("nudge", NUDGES)
@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_a_quotient_is_that_of_a_division(compiled: Compiled, nudge: int, exponent: int) -> None:
    """Of bfloat16 latents, all that do not vanish in their tile, by all scales that tiles have."""
    eight_bits = torch.arange(128, dtype=torch.int32) << 16
    largest = floats(range(127 + exponent, 128 + exponent), eight_bits)
    x = floats(range(127 + exponent - 19, 128 + exponent), eight_bits)
    x, scale = (part.flatten() for part in torch.broadcast_tensors(x, (largest / 448)[:, None]))
    for sign in (1, -1):
        found = compiled("quotients", nudge, (x * sign).contiguous(), scale.contiguous())
        assert not different(found, x * sign / scale).any()


@pytest.mark.parametrize("scale", [torch.finfo(torch.float32).tiny, 1.0, 3.0, LARGEST / 448])
def test_quotients_at_the_limits(compiled: Compiled, scale: float) -> None:
    x = torch.tensor(SPECIAL)
    by = torch.full_like(x, scale)
    assert not different(compiled("quotients", 0, x, by), x / by).any()
