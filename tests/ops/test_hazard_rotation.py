"""What goes wrong with a rotation: done twice, its pairs, its width, its precision, K written back.

That the schemas say when K is written is tested in test_torch_ops.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import FP8, Case, altered, check, check_args

BASE = Case(op="rope_store_kv_")
MLA = Case(op="rope_store_mla_", heads_q=3, head_dim=64, row_format="fp8_ds_mla")


# --- rotated twice, wrong pairing -----------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairing_by_hand(interleaved: bool, backend: Backend) -> None:
    """Position 1 turns the first pair by 90 degrees and the second by 180, position 0 nothing."""
    table = torch.tensor([[1.0, 1, 0, 0], [0, -1, 1, 0]])
    q = torch.tensor([[[1.0, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]]], device=backend.device)
    k = q.clone()
    positions = torch.tensor([0, 1], device=backend.device)
    ropool.rope_(
        q, k, table.to(backend.device), positions, interleaved=interleaved, backend=backend.name
    )
    turned = [-2.0, 1, -3, -4, 5] if interleaved else [-3.0, -2, 1, -4, 5]
    assert q.tolist() == k.tolist() == [[[1, 2, 3, 4, 5]], [turned]]


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (8, 2), (9, 3)])
@pytest.mark.parametrize("write_k", [False, True])
def test_each_head_rotated_once(heads: tuple[int, int], write_k: bool, backend: Backend) -> None:
    for op in ("rope_", "rope_store_kv_"):
        case = Case(op=op, heads_q=heads[0], heads_kv=heads[1], write_k=write_k, tokens=3)
        check(case, backend)


# --- K not written back ---------------------------------------------------------------------------


@pytest.mark.parametrize("pool_dtype", ["model", *FP8])
@pytest.mark.parametrize("k_norm", [None, "float32"])
@pytest.mark.parametrize("write_k", [False, True])
def test_k_written_back_exactly_when_asked(
    pool_dtype: str, k_norm: str | None, write_k: bool, backend: Backend
) -> None:
    """In the model dtype, unscaled, whatever the pool holds; and for padding tokens too."""
    case = replace(
        BASE, pool_dtype=pool_dtype, k_scale="tensor", k_norm=k_norm, write_k=write_k, rotary_dim=32
    )
    check(case, backend)
    check_args(case.op, altered(case, slot_mapping=torch.tensor([-1, 3, 99, 0, -5, 2])), backend)


@pytest.mark.parametrize("write_k", [False, True])
@pytest.mark.parametrize("row_format", ["model", "fp8", "fp8_ds_mla"])
def test_k_rope_written_back_exactly_when_asked(
    row_format: str, write_k: bool, backend: Backend
) -> None:
    case = replace(MLA, row_format=row_format, pool_dtype=FP8[0], write_k=write_k)
    check_args(case.op, altered(case, slot_mapping=torch.tensor([-1, 3, 99, 0, -5, 2])), backend)


# --- partial rotary -------------------------------------------------------------------------------

PARTIAL = [(64, 32), (80, 32), (80, 20), (96, 48), (112, 56), (128, 2), (128, 6), (128, 126)]
PARTIAL += [(192, 64), (256, 64), (256, 30), (576, 64), (65, 64), (67, 10), (3, 2), (2, 2)]


@pytest.mark.parametrize(("head_dim", "rotary_dim"), PARTIAL)
@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotary(
    head_dim: int, rotary_dim: int, interleaved: bool, backend: Backend
) -> None:
    """The rest of the head passes through to the pool, to q_out and, normed, to both."""
    case = replace(
        BASE, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved, table_pad=3
    )
    variants: list[dict[str, Any]] = [
        {},
        {"op": "rope_"},
        {"q_out": "model", "write_k": True},
        {"q_out": FP8[0], "q_scale": "head", "pool_dtype": FP8[0], "k_scale": "head"},
        {"q_norm": "float32", "k_norm": "model", "write_k": True},
        {"dtype": "float32", "strides": "packed"},
    ]
    for fields in variants:
        check(replace(case, **fields), backend)


# --- rotation in half precision -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("table_dtype", ["float32", "model"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_float32(
    dtype: str, table_dtype: str, interleaved: bool, backend: Backend
) -> None:
    """Many values, so that a product or a table rounded to half precision moves some of them."""
    for seed, fields in enumerate(({}, {"q_norm": "float32", "k_norm": "model"})):
        case = Case(
            op="rope_store_kv_",
            seed=seed,
            dtype=dtype,
            table_dtype=table_dtype,
            interleaved=interleaved,
            tokens=16,
            pages=4,
            head_dim=128,
            max_position=3000,
            write_k=True,
            **fields,  # type: ignore[arg-type]
        )
        check(case, backend)


@pytest.mark.parametrize("op", ["rope_", "rope_store_mla_"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_last_positions_of_a_long_context(op: str, dtype: str, backend: Backend) -> None:
    case = Case(op=op, dtype=dtype, max_position=131072, head_dim=64, tokens=4)
    positions = torch.tensor([131071, 131070, 65537, 100003])
    check_args(op, altered(case, positions=positions), backend)


# --- QK-norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 0.5])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_norm_of_small_heads(eps: float, dtype: str, backend: Backend) -> None:
    """Heads of zeros, and heads so small that `norm_eps` decides; each has a norm of its own."""
    for head_dim in (64, 72, 130):
        case = replace(
            BASE, dtype=dtype, q_norm="float32", k_norm="model", write_k=True, head_dim=head_dim
        )
        args = altered(case, norm_eps=eps)
        for name in ("q", "k"):
            args[name][0] = 0
            args[name][1:] *= 10.0 ** -torch.arange(5)[:, None, None]
            args[name][:, 0] *= 0.01
        check_args(case.op, args, backend)
