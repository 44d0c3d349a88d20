"""What goes wrong with tokens: positions past the table, padding, NaN in it, dtypes of indices."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ops.backend import Backend
from ops.calls import FP8, Case, altered, check, check_args
from ops.memory import poisoned

BASE = Case(op="rope_store_kv_")
MLA = Case(op="rope_store_mla_", heads_q=3, head_dim=64, row_format="fp8_ds_mla")


# --- position past the table ----------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rope_", "rope_store_kv_", "rope_store_mla_"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_position_outside_the_table_drops_the_token(
    op: str, dtype: torch.dtype, backend: Backend
) -> None:
    case = Case(op=op, write_k=True, max_position=5, q_out="model" if op != "rope_" else None)
    positions = torch.tensor([5, -1, 4, 2**31 - 1, -(2**31), 0], dtype=dtype)
    check_args(op, altered(case, positions=positions), backend)


@pytest.mark.parametrize("op", ["rope_", "rope_store_kv_", "rope_store_mla_"])
def test_offset_moves_the_position_outside(op: str, backend: Backend) -> None:
    case = Case(op=op, max_position=5)
    positions = torch.tensor([4, 0, 5, -3, 4, 2])
    offsets = torch.tensor([1, -1, -1, 3, 0, 2**30], dtype=torch.int32)
    check_args(op, altered(case, positions=positions, offsets=offsets), backend)


def test_sum_of_position_and_offset_does_not_wrap(backend: Backend) -> None:
    # In 32 bits both sums come out as 0 and 1, which are positions of the table.
    positions = torch.tensor([-(2**31), -(2**31), 2**31 - 1, 1], dtype=torch.int32)
    offsets = torch.tensor([-(2**31), -(2**31) + 1, 2**31 - 1, 1], dtype=torch.int32)
    case = replace(BASE, tokens=4)
    check_args(case.op, altered(case, positions=positions, offsets=offsets), backend)


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_of_three_positions_outside(interleaved: bool, backend: Backend) -> None:
    case = replace(BASE, mrope="sectioned", tokens=4, max_position=5)
    positions = torch.tensor([[5, 1, 2, 0], [1, -1, 3, 4], [2, 2, 2**31, 4]])
    # A stream that turns no frequency still makes the token invalid.
    sections = [(8, 12, 12), (32, 0, 0)]
    for section in sections:
        args = altered(
            case, positions=positions, mrope_section=section, mrope_interleaved=interleaved
        )
        check_args(case.op, args, backend)


# --- negative, short or empty mappings ------------------------------------------------------------


@pytest.mark.parametrize("op", ["rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
def test_padding_is_tested_before_the_window_map(op: str, backend: Backend) -> None:
    """Slot -1, as an index, is the map's last entry; `padding_slot` has an entry of its own."""
    case = Case(op=op, tokens=5, padding_slot=2, window="int64")
    window = torch.arange(16).flip(0).contiguous()
    args = altered(
        case, slot_mapping=torch.tensor([-1, 2, 5, -16, 0]), window_slot_map=window, padding_slot=2
    )
    check_args(op, args, backend)


@pytest.mark.parametrize("op", ["rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_the_window_map_may_hold(op: str, dtype: torch.dtype, backend: Backend) -> None:
    """Negative: padding. Past the pool: dropped. Equal to `padding_slot`: a slot like any other."""
    case = Case(op=op, tokens=6)
    window = torch.tensor([-1, 16, 2**31 - 1, 3, -(2**31), 7], dtype=dtype)
    args = altered(case, slot_mapping=torch.arange(6), window_slot_map=window, padding_slot=None)
    check_args(op, args, backend)
    check_args(op, {**args, "padding_slot": 7}, backend)


@pytest.mark.parametrize("op", ["rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
def test_an_empty_window_map_has_no_entry(op: str, backend: Backend) -> None:
    case = Case(op=op, tokens=3)
    window = poisoned(8, torch.int64, np.random.default_rng(0))[4:4]
    args = altered(case, slot_mapping=torch.tensor([0, -1, 5]), window_slot_map=window)
    check_args(op, args, backend)


@pytest.mark.parametrize(
    "op", ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"]
)
def test_no_tokens(op: str, backend: Backend) -> None:
    check(Case(op=op, tokens=0), backend)


def test_pools_and_tables_without_rows(backend: Backend) -> None:
    """Every slot, or every position, is out of range; nothing is divided by a page of no tokens."""
    for pages, page_size in ((0, 4), (4, 0)):
        for layout in ("NHD", "HND"):
            case = replace(BASE, layout=layout)
            shape = (pages, page_size, 2, 64) if layout == "NHD" else (pages, 2, page_size, 64)
            k_pool, v_pool = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
            check_args(case.op, altered(case, k_pool=k_pool, v_pool=v_pool), backend)
    check_args(MLA.op, altered(MLA, pool=torch.empty(0, 4, 656, dtype=torch.uint8)), backend)
    check_args(BASE.op, altered(BASE, cos_sin_cache=torch.empty(0, 64)), backend)


@pytest.mark.parametrize("op", ["store_kv_", "rope_store_kv_", "store_mla_", "rope_store_mla_"])
@pytest.mark.parametrize("padding_slot", [None, 0, 15, 16, 10**6, 2**31 - 1, -3])
def test_queries_of_padding_tokens_are_rotated(
    op: str, padding_slot: int | None, backend: Backend
) -> None:
    """All tokens are padding: the pool keeps every bit, the queries turn all the same."""
    mapping = torch.tensor([-1, -2, -(2**31), -3, -1, -1])
    if padding_slot is not None:
        mapping[::2] = padding_slot
    case = Case(op=op, padding_slot=padding_slot)
    check_args(op, altered(case, slot_mapping=mapping), backend)


# --- NaN in padding -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["store_kv_", "rope_store_kv_", "store_mla_", "rope_store_mla_"])
@pytest.mark.parametrize("pool", ["model", "fp8"])
def test_nan_of_a_padded_row_stays_out_of_the_pool(op: str, pool: str, backend: Backend) -> None:
    fields = {"pool_dtype": FP8[0], "row_format": "fp8_ds_mla"} if pool == "fp8" else {}
    case = Case(op=op, head_dim=64, **fields)  # type: ignore[arg-type]
    args = altered(case, slot_mapping=torch.tensor([-1, 3, 16, 2**31 - 1, -2, 0]))
    for name in ("q", "k", "v", "q_rope", "k_nope", "k_rope"):
        if name in args:
            args[name][[0, 2, 3, 4]] = float("nan")
    check_args(op, args, backend)


# --- index dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rope_store_kv_", "rope_store_mla_"])
def test_every_mix_of_index_dtypes(op: str, backend: Backend) -> None:
    ints = ["int32", "int64"]
    for position, slot, offset, window in itertools.product(
        ints, ints, [None, *ints], [None, *ints]
    ):
        for strides in ("dense", "odd"):
            case = Case(
                op=op,
                position_dtype=position,
                slot_dtype=slot,
                offset_dtype=offset,
                window=window,
                strides=strides,
                tokens=5,
                head_dim=8,
                latent_dim=16,
            )
            check(case, backend)


def test_high_halves_of_int64_count(backend: Backend) -> None:
    """Read as int32, each is a slot of the pool, an entry of the map, a position of the table."""
    far = torch.tensor([2**32, 2**32 + 1, 2**33 + 2, -(2**32) + 3, 2**40, 4])
    case = replace(BASE, tokens=6)
    check_args(case.op, altered(case, slot_mapping=far), backend)
    check_args(case.op, altered(case, positions=far), backend)
    check_args(case.op, altered(case, offsets=far), backend)
    window = torch.arange(16)
    check_args(case.op, altered(case, slot_mapping=far, window_slot_map=window), backend)
    mapped = {"slot_mapping": torch.arange(6), "window_slot_map": far}
    check_args(case.op, altered(case, **mapped), backend)
    # 2**32 + 5 is no slot, so it is no other name of slot 5 either.
    args = altered(case, slot_mapping=torch.tensor([5, 1, 2, 3, 4, 0]), padding_slot=2**32 + 5)
    check_args(case.op, args, backend)
    mla = replace(MLA, tokens=6)
    check_args(mla.op, altered(mla, slot_mapping=far), backend)
