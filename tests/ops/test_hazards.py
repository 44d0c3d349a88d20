"""A named test for each class of defect that kernels of this kind have shipped, on every backend.

    address arithmetic (01)      here for strides that fit memory, test_large_addresses.py past 2**31 and 2**32
    reads past a tensor (02, 08) test_guard_pages.py: the neighbouring memory is not mapped
    schema of K (04)             test_torch_ops.py
    kernel chosen by key (13)    here
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import FP8, Args, Case, arguments, check, check_args
from ops.memory import placed, poisoned, strided
from oracle import expected
from oracle.formats import decode

BASE = Case(op="rope_store_kv_")
MLA = Case(op="rope_store_mla_", heads_q=3, head_dim=64, row_format="fp8_ds_mla")


def altered(case: Case, **tensors: Any) -> Args:
    """The arguments of `case` with some replaced."""
    return {**arguments(case), **tensors}


# --- 02 position past the table -------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rope_", "rope_store_kv_", "rope_store_mla_"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hazard_02_position_outside_the_table_drops_the_token(
    op: str, dtype: torch.dtype, backend: Backend
) -> None:
    case = Case(op=op, write_k=True, max_position=5, q_out="model" if op != "rope_" else None)
    positions = torch.tensor([5, -1, 4, 2**31 - 1, -(2**31), 0], dtype=dtype)
    check_args(op, altered(case, positions=positions), backend)


@pytest.mark.parametrize("op", ["rope_", "rope_store_kv_", "rope_store_mla_"])
def test_hazard_02_offset_moves_the_position_outside(op: str, backend: Backend) -> None:
    case = Case(op=op, max_position=5)
    positions = torch.tensor([4, 0, 5, -3, 4, 2])
    offsets = torch.tensor([1, -1, -1, 3, 0, 2**30], dtype=torch.int32)
    check_args(op, altered(case, positions=positions, offsets=offsets), backend)


def test_hazard_02_sum_of_position_and_offset_does_not_wrap(backend: Backend) -> None:
    # In 32 bits both sums come out as 0 and 1, which are positions of the table.
    positions = torch.tensor([-(2**31), -(2**31), 2**31 - 1, 1], dtype=torch.int32)
    offsets = torch.tensor([-(2**31), -(2**31) + 1, 2**31 - 1, 1], dtype=torch.int32)
    case = replace(BASE, tokens=4)
    check_args(case.op, altered(case, positions=positions, offsets=offsets), backend)


@pytest.mark.parametrize("interleaved", [False, True])
def test_hazard_02_one_of_three_positions_outside(interleaved: bool, backend: Backend) -> None:
    case = replace(BASE, mrope="sectioned", tokens=4, max_position=5)
    positions = torch.tensor([[5, 1, 2, 0], [1, -1, 3, 4], [2, 2, 2**31, 4]])
    # A stream that turns no frequency still makes the token invalid.
    sections = [(8, 12, 12), (32, 0, 0)]
    for section in sections:
        args = altered(
            case, positions=positions, mrope_section=section, mrope_interleaved=interleaved
        )
        check_args(case.op, args, backend)


# --- 03 rotated twice, wrong pairing --------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_hazard_03_pairing_by_hand(interleaved: bool, backend: Backend) -> None:
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
def test_hazard_03_each_head_rotated_once(
    heads: tuple[int, int], write_k: bool, backend: Backend
) -> None:
    for op in ("rope_", "rope_store_kv_"):
        case = Case(op=op, heads_q=heads[0], heads_kv=heads[1], write_k=write_k, tokens=3)
        check(case, backend)


# --- 04 K not written back ------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_dtype", ["model", *FP8])
@pytest.mark.parametrize("k_norm", [None, "float32"])
@pytest.mark.parametrize("write_k", [False, True])
def test_hazard_04_k_written_back_exactly_when_asked(
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
def test_hazard_04_k_rope_written_back_exactly_when_asked(
    row_format: str, write_k: bool, backend: Backend
) -> None:
    case = replace(MLA, row_format=row_format, pool_dtype=FP8[0], write_k=write_k)
    check_args(case.op, altered(case, slot_mapping=torch.tensor([-1, 3, 99, 0, -5, 2])), backend)


# --- 05 partial rotary ----------------------------------------------------------------------------------

PARTIAL = [(64, 32), (80, 32), (80, 20), (96, 48), (112, 56), (128, 2), (128, 6), (128, 126)]
PARTIAL += [(192, 64), (256, 64), (256, 30), (576, 64), (65, 64), (67, 10), (3, 2), (2, 2)]


@pytest.mark.parametrize(("head_dim", "rotary_dim"), PARTIAL)
@pytest.mark.parametrize("interleaved", [False, True])
def test_hazard_05_partial_rotary(
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


# --- 06 negative, short or empty mappings ---------------------------------------------------------------


@pytest.mark.parametrize("op", ["rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
def test_hazard_06_padding_is_tested_before_the_window_map(op: str, backend: Backend) -> None:
    """Slot -1, as an index, is the map's last entry; `padding_slot` has an entry of its own."""
    case = Case(op=op, tokens=5, padding_slot=2, window="int64")
    window = torch.arange(16).flip(0).contiguous()
    args = altered(
        case, slot_mapping=torch.tensor([-1, 2, 5, -16, 0]), window_slot_map=window, padding_slot=2
    )
    check_args(op, args, backend)


@pytest.mark.parametrize("op", ["rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hazard_06_what_the_window_map_may_hold(
    op: str, dtype: torch.dtype, backend: Backend
) -> None:
    """Negative: padding. Past the pool: dropped. Equal to `padding_slot`: a slot like any other."""
    case = Case(op=op, tokens=6)
    window = torch.tensor([-1, 16, 2**31 - 1, 3, -(2**31), 7], dtype=dtype)
    args = altered(
        case, slot_mapping=torch.arange(6), window_slot_map=window, padding_slot=None
    )
    check_args(op, args, backend)
    check_args(op, {**args, "padding_slot": 7}, backend)


@pytest.mark.parametrize("op", ["rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
def test_hazard_06_an_empty_window_map_has_no_entry(op: str, backend: Backend) -> None:
    case = Case(op=op, tokens=3)
    window = poisoned(8, torch.int64, np.random.default_rng(0))[4:4]
    args = altered(case, slot_mapping=torch.tensor([0, -1, 5]), window_slot_map=window)
    check_args(op, args, backend)


@pytest.mark.parametrize("op", ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
def test_hazard_06_no_tokens(op: str, backend: Backend) -> None:
    check(Case(op=op, tokens=0), backend)


@pytest.mark.parametrize("op", ["store_kv_", "rope_store_kv_", "store_mla_", "rope_store_mla_"])
@pytest.mark.parametrize("padding_slot", [None, 0, 15, 16, 10**6, 2**31 - 1, -3])
def test_hazard_06_queries_of_padding_tokens_are_rotated(
    op: str, padding_slot: int | None, backend: Backend
) -> None:
    """All tokens are padding: the pool keeps every bit, the queries turn all the same."""
    mapping = torch.tensor([-1, -2, -(2**31), -3, -1, -1])
    if padding_slot is not None:
        mapping[::2] = padding_slot
    case = Case(op=op, padding_slot=padding_slot)
    check_args(op, altered(case, slot_mapping=mapping), backend)


# --- 07 NaN in padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["store_kv_", "rope_store_kv_", "store_mla_", "rope_store_mla_"])
@pytest.mark.parametrize("pool", ["model", "fp8"])
def test_hazard_07_nan_of_a_padded_row_stays_out_of_the_pool(
    op: str, pool: str, backend: Backend
) -> None:
    fields = {"pool_dtype": FP8[0], "row_format": "fp8_ds_mla"} if pool == "fp8" else {}
    case = Case(op=op, head_dim=64, **fields)  # type: ignore[arg-type]
    args = altered(case, slot_mapping=torch.tensor([-1, 3, 16, 2**31 - 1, -2, 0]))
    for name in ("q", "k", "v", "q_rope", "k_nope", "k_rope"):
        if name in args:
            args[name][[0, 2, 3, 4]] = float("nan")
    check_args(op, args, backend)


# --- 08 strides -----------------------------------------------------------------------------------------


def _separate_strides(backend: Backend, **fields: Any) -> None:
    """Each of Q, K, V and q_out with token and head strides of its own."""
    case = replace(BASE, **fields)
    rng = np.random.default_rng(1)
    args = arguments(case)
    names = ["q", "k", "v"] + ["q_out"] * (case.q_out is not None)
    for name, pads in zip(names, [(40, 3, 0), (7, 24, 0), (1, 11, 0), (16, 5, 0)], strict=False):
        old = args[name]
        args[name] = strided(old.shape, old.dtype, rng, pads=pads, shift=3)
        args[name].copy_(old)
    check_args(case.op, args, backend)


@pytest.mark.parametrize("heads", [(8, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hazard_08_each_tensor_has_its_own_strides(
    heads: tuple[int, int], dtype: str, backend: Backend
) -> None:
    for q_out, write_k in itertools.product([None, "model"], [False, True]):
        _separate_strides(
            backend, heads_q=heads[0], heads_kv=heads[1], dtype=dtype, q_out=q_out, write_k=write_k
        )


@pytest.mark.parametrize("op", ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
@pytest.mark.parametrize("strides", ["packed", "odd", "heads_first", "random"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hazard_08_strided_views(op: str, strides: str, dtype: str, backend: Backend) -> None:
    for heads, head_dim, seed in [((4, 2), 64, 0), ((1, 1), 80, 1), ((9, 3), 38, 2), ((5, 5), 10, 3)]:
        case = Case(
            op=op,
            heads_q=heads[0],
            heads_kv=heads[1],
            head_dim=head_dim,
            strides=strides,
            dtype=dtype,
            latent_dim=100,
            seed=seed,
        )
        check(case, backend)


@pytest.mark.parametrize("stride", [0, 1, 3, 10**9])
def test_hazard_08_strides_of_size_one_dimensions_mean_nothing(
    stride: int, backend: Backend
) -> None:
    case = replace(BASE, tokens=1, heads_q=1, heads_kv=1, pages=1, page_size=1, q_out="model")
    args = altered(case, slot_mapping=torch.tensor([0]))
    for name in ("q", "k", "v", "q_out", "k_pool", "v_pool"):
        view = args[name]
        strides = [stride] * (view.dim() - 1) + [1]
        args[name] = view.as_strided(view.shape, strides, view.storage_offset())
    check_args(case.op, args, backend)
    one = replace(BASE, op="store_mla_", tokens=1, pages=1, page_size=1)
    args = altered(one, slot_mapping=torch.tensor([0]))
    for name in ("k_nope", "k_rope", "pool"):
        view = args[name]
        strides = [stride] * (view.dim() - 1) + [1]
        args[name] = view.as_strided(view.shape, strides, view.storage_offset())
    check_args(one.op, args, backend)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hazard_08_rows_that_fill_no_block(dtype: str, backend: Backend) -> None:
    """Every head dim up to two vectors of bytes and some, so that each remainder of a loop occurs."""
    for head_dim in [*range(2, 36), 38, 46, 62, 63, 65, 66, 70, 126, 130]:
        rotary = head_dim // 2 * 2
        case = replace(
            BASE,
            tokens=2,
            head_dim=head_dim,
            rotary_dim=rotary if head_dim % 3 else max(2, rotary // 2 // 2 * 2),
            v_head_dim=head_dim + head_dim % 4,
            dtype=dtype,
            heads_q=2,
            heads_kv=1,
            interleaved=head_dim % 2 == 1,
            pool_dtype=["model", *FP8][head_dim % 3],
            write_k=head_dim % 2 == 0,
        )
        check(case, backend)


def test_hazard_08_inputs_that_repeat_one_head(backend: Backend) -> None:
    """What is only read may have stride 0: V, a scale, M-RoPE positions expanded from one row."""
    case = replace(BASE, pool_dtype=FP8[0], mrope="sectioned", heads_q=4, heads_kv=4)
    args = arguments(case)
    args["v"] = args["v"][:, :1].expand(-1, 4, -1)
    args["k"] = args["k"][:1].expand(6, -1, -1)
    args["positions"] = args["positions"][:1].expand(3, -1)
    check_args(case.op, args, backend)


@pytest.mark.parametrize("layout", ["NHD", "HND", "slots", "x_packed", "shuffled"])
@pytest.mark.parametrize("pool_strides", ["dense", "kv", "odd", "random"])
@pytest.mark.parametrize("pool_dtype", ["model", "float8_e4m3fn"])
def test_hazard_08_pool_views(
    layout: str, pool_strides: str, pool_dtype: str, backend: Backend
) -> None:
    for op in ("store_kv_", "rope_store_kv_"):
        case = Case(op=op, layout=layout, pool_strides=pool_strides, pool_dtype=pool_dtype)
        check(replace(case, pages=10, page_size=8, tokens=9, heads_kv=4), backend)


# --- 09 index dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rope_store_kv_", "rope_store_mla_"])
def test_hazard_09_every_mix_of_index_dtypes(op: str, backend: Backend) -> None:
    ints = ["int32", "int64"]
    for position, slot, offset, window in itertools.product(ints, ints, [None, *ints], [None, *ints]):
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


def test_hazard_09_high_halves_of_int64_count(backend: Backend) -> None:
    """Read as int32, each of these is a slot of the pool, an entry of the map or a position of the table."""
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


# --- 10 fp8 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", FP8)
@pytest.mark.parametrize("scale", [None, 1.0, 0.37, 2.0**-20])
def test_hazard_10_every_half_value_in_fp8(
    source: torch.dtype, stored: str, scale: float | None, backend: Backend
) -> None:
    """All 65536 of them: subnormals, ties, values past the largest, infinities, NaN."""
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(source).view(128, 2, 256)
    pool = torch.zeros(8, 16, 2, 256, dtype=getattr(torch, stored))
    scales = None if scale is None else torch.tensor(scale)
    args = {
        "k": codes,
        "v": codes.flip(0).contiguous(),
        "k_pool": pool,
        "v_pool": pool.clone(),
        "slot_mapping": torch.arange(128),
        "k_scale": scales,
        "v_scale": scales,
    }
    check_args("store_kv_", args, backend)


@pytest.mark.parametrize("stored", FP8)
def test_hazard_10_float32_next_to_every_tie(stored: str, backend: Backend) -> None:
    """Between two neighbours of the format, the last float32 before the middle, the middle, the first after."""
    dtype = getattr(torch, stored)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    values = np.unique(decode(codes)[np.isfinite(decode(codes))])
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    past = np.float32([464, 465, 479, 480, 512, 1e30, 61440, 65504, 3e38, 2**-10, 2**-17, 1e-40, 1e-45])
    exact = np.concatenate([middle, values.astype(np.float32), past, -past])
    both = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
    both = np.resize(both, (len(both) + 31) // 32 * 32)
    k = torch.from_numpy(both).view(-1, 1, 32)
    tokens = k.shape[0]
    pool = torch.zeros(tokens, 1, 32, dtype=dtype)
    args = {
        "k": k,
        "v": -k,
        "k_pool": pool,
        "v_pool": pool.clone(),
        "slot_mapping": torch.arange(tokens),
        "layout": "slots",
    }
    check_args("store_kv_", args, backend)


@pytest.mark.parametrize("stored", FP8)
def test_hazard_10_scales_divide_and_each_head_has_its_own(stored: str, backend: Backend) -> None:
    for k_scale, v_scale, q_scale in itertools.product([None, "one", "tensor", "head"], repeat=3):
        case = replace(
            BASE,
            pool_dtype=stored,
            k_scale=k_scale,
            v_scale=v_scale,
            q_out=stored,
            q_scale=q_scale,
            tokens=3,
            head_dim=16,
            heads_q=8,
            heads_kv=4,
            specials=True,
        )
        check(case, backend)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("op", ["store_mla_", "rope_store_mla_"])
def test_hazard_10_mla_tiles_of_every_kind(op: str, dtype: str, backend: Backend) -> None:
    """Tiles that are all zero, all NaN, tiny, infinite, and with the largest value in each corner."""
    case = replace(MLA, op=op, dtype=dtype, tokens=16, pages=4, page_size=5, pool_strides="odd")
    args = arguments(case)
    nope = args["k_nope"]
    tiles = nope.unflatten(1, (4, 128))
    tiles[0] = 0
    tiles[1] = -0.0
    tiles[2] = float("nan")
    tiles[3, :, 5] = float("inf")
    tiles[4, :, 127] = float("-inf")
    tiles[5, :, 0] = float("nan")
    tiles[6] = torch.finfo(nope.dtype).tiny
    tiles[7] = torch.finfo(nope.dtype).max
    tiles[8, :, 1:] = 0
    tiles[9, 0] = 0
    tiles[10] = torch.finfo(nope.dtype).smallest_normal / 4
    tiles[11, 2] *= 1000
    tiles[12, :, 127] = 300
    tiles[13, :, 0] = -300
    tiles[14, :, 64] = float("nan")
    tiles[14, :, 65] = float("inf")
    check_args(op, args, backend)


# --- 11 rotation in half precision ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("table_dtype", ["float32", "model"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_hazard_11_rotation_is_float32(
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
def test_hazard_11_last_positions_of_a_long_context(
    op: str, dtype: str, backend: Backend
) -> None:
    case = Case(op=op, dtype=dtype, max_position=131072, head_dim=64, tokens=4)
    positions = torch.tensor([131071, 131070, 65537, 100003])
    check_args(op, altered(case, positions=positions), backend)


# --- 13 a cache that drops a field ----------------------------------------------------------------------

KV_VARIANTS: list[dict[str, Any]] = [
    {"interleaved": True},
    {"rotary_dim": 32},
    {"rotary_dim": 30},
    {"table_dtype": "bfloat16"},
    {"table_pad": 4},
    {"position_dtype": "int32"},
    {"slot_dtype": "int32"},
    {"offset_dtype": "int32"},
    {"offset_dtype": "int64"},
    {"mrope": "sectioned"},
    {"mrope": "interleaved"},
    {"q_norm": "float32"},
    {"k_norm": "float32"},
    {"q_norm": "bfloat16", "k_norm": "bfloat16"},
    {"layout": "HND"},
    {"pool_dtype": FP8[0]},
    {"pool_dtype": FP8[1]},
    {"pool_dtype": FP8[0], "k_scale": "tensor"},
    {"pool_dtype": FP8[0], "k_scale": "head"},
    {"pool_dtype": FP8[0], "v_scale": "head"},
    {"q_out": "model"},
    {"q_out": FP8[0]},
    {"q_out": FP8[0], "q_scale": "head"},
    {"write_k": True},
    {"padding_slot": 3},
    {"padding_slot": 0},
    {"padding_slot": 1},
    {"window": "int32"},
    {"window": "int64"},
    {"strides": "packed"},
    {"strides": "odd"},
    {"pool_strides": "kv"},
    {"pool_strides": "odd"},
    {"heads_q": 2, "heads_kv": 1},
    {"tokens": 5},
    {"seed": 1, "q_norm": "float32"},
    {"seed": 2, "q_norm": "float32"},
    {"pages": 3},
    {"dtype": "float16"},
    {"v_head_dim": 32},
]


def test_hazard_13_calls_that_differ_in_one_field(backend: Backend) -> None:
    """Each alternates with the base call, so that a kernel kept for one must not serve the other."""
    base = replace(BASE, tokens=4, head_dim=64, heads_q=2, heads_kv=2, page_size=2)
    everything = arguments(base)
    everything["slot_mapping"].copy_(torch.arange(4))
    for fields in KV_VARIANTS:
        check(replace(base, **fields), backend)
        check_args(base.op, everything, backend)
    for padding in (None, 0, 1, 2, 3, None):
        check_args(base.op, {**everything, "padding_slot": padding}, backend)
    for eps in (1e-6, 1e-5, 1.0, 1e-6):
        weight = torch.ones(64)
        check_args(base.op, {**everything, "q_norm_weight": weight, "norm_eps": eps}, backend)
    for section in ((32, 0, 0), (0, 32, 0), (16, 8, 8), (8, 8, 16)):
        positions = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6], [20, 30, 10, 0]])
        args = {**everything, "positions": positions, "mrope_section": section}
        check_args(base.op, args, backend)
        check_args(base.op, {**args, "mrope_interleaved": True}, backend)


def test_hazard_13_same_shapes_at_other_addresses(backend: Backend) -> None:
    """What is kept for a signature must hold no address: alignment and memory change from call to call."""
    for shift in (0, 1, 3, 8):
        rng = np.random.default_rng(shift)
        args = arguments(replace(BASE, seed=shift))
        for name in ("q", "k", "v", "k_pool", "v_pool", "cos_sin_cache"):
            old = args[name]
            args[name] = strided(old.shape, old.dtype, rng, shift=shift)
            args[name].copy_(old)
        check_args(BASE.op, args, backend)


def test_hazard_13_tables_may_change_in_place(backend: Backend) -> None:
    """A scale, a table or a map is read in each call, never remembered."""
    case = replace(BASE, pool_dtype=FP8[0], k_scale="tensor", window="int64", q_norm="float32")
    args = placed(arguments(case), backend.device)
    getattr(ropool, case.op)(**args, backend=backend.name)
    args["k_scale"].mul_(3)
    args["cos_sin_cache"].copy_(args["cos_sin_cache"].flip(0))
    args["window_slot_map"].copy_(args["window_slot_map"].flip(0))
    args["q_norm_weight"].neg_()
    before = placed(args, "cpu")
    check_args(case.op, before, backend)


# --- 14 launch faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"])
def test_hazard_14_any_number_of_tokens(op: str, backend: Backend) -> None:
    """Few, many and every remainder of a split over threads."""
    for tokens in [*range(1, 20), 31, 33, 63, 64, 65, 127, 257]:
        case = Case(
            op=op,
            tokens=tokens,
            heads_q=2,
            heads_kv=1,
            head_dim=8,
            latent_dim=8,
            pages=260,
            page_size=1,
            mistakes=tokens % 2 == 0,
            strides=["dense", "odd"][tokens % 2],
        )
        check(case, backend)


@pytest.mark.parametrize("heads", [(128, 1), (128, 128), (1100, 11), (2049, 1)])
def test_hazard_14_very_many_heads(heads: tuple[int, int], backend: Backend) -> None:
    for op in ("rope_", "rope_store_kv_", "store_kv_", "rope_store_mla_"):
        case = Case(op=op, tokens=2, heads_q=heads[0], heads_kv=heads[1], head_dim=8, latent_dim=8)
        check(case, backend)


def test_hazard_14_work_enough_for_every_thread(backend: Backend) -> None:
    """A call large enough to be split, with tokens that are dropped in each part."""
    for op in ("rope_store_kv_", "store_kv_", "rope_store_mla_"):
        case = Case(
            op=op, tokens=300, heads_q=9, heads_kv=3, pages=20, page_size=16, mistakes=True, seed=4
        )
        check(case, backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", [(128, 128), (96, 3), (67, 67)])
def test_hazard_14_few_wide_tokens(
    dtype: str, heads: tuple[int, int], backend: Backend
) -> None:
    """So wide that a token's heads are dealt to several threads, with scales of their own."""
    case = Case(dtype=dtype, tokens=2, heads_q=heads[0], heads_kv=heads[1], head_dim=512)
    fp8 = {"pool_dtype": FP8[0], "k_scale": "head", "v_scale": "head"}
    variants: list[dict[str, Any]] = [
        {"write_k": True, "q_norm": "float32", "k_norm": "float32"},
        {**fp8, "q_out": FP8[1], "q_scale": "head", "write_k": True, "layout": "HND"},
    ]
    for fields in variants:
        check(replace(case, pages=1, page_size=2, **fields), backend)


LARGE: list[dict[str, Any]] = [
    {"op": "store_kv_"},
    {"op": "store_kv_", "layout": "HND", "pool_strides": "kv"},
    {"op": "store_kv_", "layout": "x_packed", "pool_strides": "odd"},
    {"op": "store_kv_", "pool_strides": "odd"},
    {"op": "rope_store_kv_"},
    {"op": "rope_store_kv_", "write_k": True, "pool_strides": "kv"},
    {"op": "rope_store_kv_", "layout": "HND", "k_norm": "model", "strides": "packed"},
    {"op": "rope_store_kv_", "head_dim": 513, "rotary_dim": 64},
    {"op": "rope_store_kv_", "dtype": "float32", "tokens": 280},
    {"op": "rope_store_kv_", "pool_dtype": FP8[0], "k_scale": "head", "tokens": 1100},
    {"op": "rope_store_mla_", "tokens": 4000, "heads_q": 1, "head_dim": 64, "pages": 1000},
]


@pytest.mark.parametrize("fields", LARGE, ids=str)
def test_hazard_14_stores_larger_than_the_caches(
    fields: dict[str, Any], backend: Backend
) -> None:
    """More than 4 MiB into the pool, where a kernel may write past the caches, a whole line at a time."""
    if backend.name == "reference":
        pytest.skip("plain torch writes all sizes alike")
    base = Case(tokens=560, heads_q=4, heads_kv=4, head_dim=512, pages=280, mistakes=True, seed=3)
    check(replace(base, **fields), backend)


# --- 15 head counts and dims ----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(9, 3), (32, 8), (1, 1), (8, 1), (5, 5), (12, 4), (7, 7), (15, 3)])
def test_hazard_15_head_counts(heads: tuple[int, int], backend: Backend) -> None:
    for layout, pool_dtype in itertools.product(("NHD", "x_packed"), ("model", FP8[0])):
        case = replace(BASE, heads_q=heads[0], heads_kv=heads[1], tokens=3)
        fields = {"layout": layout, "pool_dtype": pool_dtype, "k_scale": "head"}
        check(replace(case, **fields), backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512, 576])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hazard_15_head_dims(
    head_dim: int, interleaved: bool, dtype: str, backend: Backend
) -> None:
    case = replace(BASE, head_dim=head_dim, interleaved=interleaved, dtype=dtype, tokens=3)
    check(case, backend)
    norms = {"q_norm": "float32", "k_norm": "model", "pool_dtype": FP8[0], "strides": "packed"}
    check(replace(case, **norms), backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["NHD", "HND", "slots", "x_packed", "shuffled"])
@pytest.mark.parametrize("page_size", [1, 16, 24, 40])
def test_hazard_15_page_sizes_that_are_no_power_of_two(
    layout: str, page_size: int, backend: Backend
) -> None:
    group = 1 if page_size == 1 else 8
    for pool_dtype in ("model", FP8[1]):
        case = Case(
            op="store_kv_",
            layout=layout,
            page_size=page_size,
            pages=40 if page_size == 1 or layout == "slots" else 3,
            dim_group=group,
            tokens=30,
            head_dim=48,
            v_head_dim=19,
            pool_dtype=pool_dtype,
        )
        check(case, backend)


# --- 16 aliasing ----------------------------------------------------------------------------------------


def test_hazard_16_arguments_that_share_a_storage(backend: Backend) -> None:
    """Q, K, V of one projection and K, V planes of one pool; q_out in a gap of the projection's rows."""
    case = replace(BASE, strides="packed", pool_strides="kv", write_k=True)
    check(case, backend)
    rng = np.random.default_rng(0)
    row = strided((6, 2 * 256 + 128 + 128), torch.bfloat16, rng)
    args = arguments(case)
    q, q_out, k, v = row.split([256, 256, 128, 128], dim=1)
    shapes = {"q": (4, 64), "q_out": (4, 64), "k": (2, 64), "v": (2, 64)}
    views = {"q": q, "q_out": q_out, "k": k, "v": v}
    for name, view in views.items():
        args[name] = view.unflatten(1, shapes[name])
        args[name].copy_(torch.randn(6, *shapes[name]))
    check_args(case.op, args, backend)


def test_duplicate_slots_write_one_of_their_tokens(backend: Backend) -> None:
    """Which token wins is unspecified; nothing else may happen."""
    case = replace(BASE, tokens=6, op="store_kv_")
    mapping = torch.tensor([3, 5, 3, 3, 5, 9])
    args = altered(case, slot_mapping=mapping)
    after = placed(args, backend.device)
    ropool.store_kv_(**after, backend=backend.name)
    for part in ("k", "v"):
        pool = after[f"{part}_pool"].cpu().flatten(0, 1)
        old = args[f"{part}_pool"].flatten(0, 1)
        for slot in range(16):
            writers = [args[part][t] for t in range(6) if mapping[t] == slot] or [old[slot]]
            same = [pool[slot].view(torch.int16) == row.view(torch.int16) for row in writers]
            assert torch.stack(same).any(dim=0).all()


def test_expected_counts_are_not_empty() -> None:
    """The base calls of this file do write: a test that compares nothing passes by accident."""
    for case in (BASE, MLA):
        assert all(result.written.any() or result.arg in ("k", "k_rope") for result in expected(case.op, arguments(case)))
