"""Offsets past 2**32 elements, in memory of which only the touched pages come into being.

Each offset is one whose lower half names another element of the same buffer, so that arithmetic of
32 bits reads or writes the wrong one, and does not leave the buffer.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metal_kernels.cases import check
from metal_kernels.harness import Call, Shape, run
from ops.test_large_addresses import Space

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="needs memory that exists when touched"
)

FAR = 2**32
ROTARY = 256


def small(tokens: int = 2, rows: int = 64) -> Call:
    """A call of the fused kernel with a cos/sin table, which writes a slot for each token."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    angles = torch.outer(torch.arange(rows).double(), torch.linspace(1, 0.01, ROTARY // 2).double())
    tensors = {
        "q": normal(tokens, 4, ROTARY),
        "k": normal(tokens, 2, ROTARY),
        "v": normal(tokens, 2, ROTARY),
        "positions": torch.arange(3, 3 + tokens, dtype=torch.int32),
        "slots": torch.arange(tokens, 0, -1, dtype=torch.int32),
        "source": torch.cat([angles.cos(), angles.sin()], 1).float(),
        "q_out": torch.full((tokens, 4, ROTARY), 77.0, dtype=torch.bfloat16),
        "k_out": torch.full((tokens, 2, ROTARY), 77.0, dtype=torch.bfloat16),
        "k_pool": torch.full((tokens + 1, 2, ROTARY), 77.0, dtype=torch.bfloat16),
        "v_pool": torch.full((tokens + 1, 2, ROTARY), 77.0, dtype=torch.bfloat16),
    }
    shape = Shape(tokens, 4, 2, ROTARY, ROTARY, False)
    return Call("rope_pool_fused", shape, tensors, tokens + 1, 1)


def expected(lib: ctypes.CDLL) -> dict[str, Tensor]:
    """What the call leaves, by a run in plain tensors that is checked in float64."""
    call = small()
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    assert run(lib, call) == 0
    assert not torch.equal(call.tensors["q_out"], before["q"])
    check(call, before)
    return call.tensors


def far(tensor: Tensor, dim: int) -> Tensor:
    """The same values with the elements of `dim` more than 2**32 elements apart."""
    strides = list(tensor.stride())
    strides[dim] = FAR + tensor.numel()
    size = (strides[dim] * (tensor.shape[dim] - 1) + tensor.numel()) * tensor.element_size()
    view = Space(size).view(tensor.shape, strides, tensor.dtype, 0)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize(
    "name, dim",
    [*((name, dim) for name in "qkv" for dim in (0, 1)), ("positions", 0), ("slots", 0)],
)
def test_strides(lib: ctypes.CDLL, name: str, dim: int) -> None:
    """Tokens that are far apart, and heads."""
    call = small()
    call.tensors[name] = far(call.tensors[name], dim)
    assert run(lib, call, count=False) == 0
    for output, values in expected(lib).items():
        assert torch.equal(call.tensors[output], values), output


def test_the_outputs_of_the_last_of_many_tokens(lib: ctypes.CDLL) -> None:
    """Only the threads of the last two tokens run."""
    first = FAR // (2 * ROTARY)  # the first token whose row of `k_out` begins at 2**32 elements
    call = replace(small(), first_token=first)
    call.shape.tokens = first + 2
    for name in ("q", "k", "v", "positions", "slots"):
        x = call.tensors[name]
        size = x.stride(0) * x.element_size()
        many = Space((first + 2) * size).view((first + 2, *x.shape[1:]), x.stride(), x.dtype, 0)
        many[first:] = x
        call.tensors[name] = many
    for name in ("q_out", "k_out"):
        x = call.tensors[name]
        size = (first + 2) * x.stride(0) * x.element_size()
        call.tensors[name] = Space(size).view((first + 2, *x.shape[1:]), x.stride(), x.dtype, 0)
    assert run(lib, call, count=False) == 0
    values = expected(lib)
    for name in ("q_out", "k_out"):
        assert torch.equal(call.tensors[name][first:], values[name]), name
    for name in ("k_pool", "v_pool"):
        assert torch.equal(call.tensors[name], values[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_table_past_32_bits(lib: ctypes.CDLL, dtype: torch.dtype) -> None:
    near, call = small(), small()
    for one in (near, call):
        one.source = 1 if dtype == torch.float32 else 2
        one.tensors["source"] = one.tensors["source"].to(dtype)
    assert run(lib, near) == 0
    table = call.tensors["source"]
    rows = FAR // ROTARY + len(table)
    large = Space(rows * ROTARY * table.element_size()).view((rows, ROTARY), (ROTARY, 1), dtype, 0)
    large[-len(table) :] = table
    call.tensors["source"] = large
    call.tensors["positions"] += rows - len(table)
    assert run(lib, call, count=False) == 0
    for name in ("q_out", "k_out", "k_pool", "v_pool"):
        assert torch.equal(call.tensors[name], near.tensors[name]), name
