"""What goes wrong between calls: a kernel kept for another one, work split wrongly over threads,
sizes that are no power of two."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import FP8, Case, arguments, check, check_args
from ops.memory import placed, strided

BASE = Case(op="rope_store_kv_")


# --- a cache that drops a field -------------------------------------------------------------------

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


def test_calls_that_differ_in_one_field(backend: Backend) -> None:
    """Each alternates with the base call: a kernel kept for one must not serve the other."""
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


def test_same_shapes_at_other_addresses(backend: Backend) -> None:
    """What is kept for a signature holds no address: memory and alignment change between calls."""
    for shift in (0, 1, 3, 8):
        rng = np.random.default_rng(shift)
        args = arguments(replace(BASE, seed=shift))
        for name in ("q", "k", "v", "k_pool", "v_pool", "cos_sin_cache"):
            old = args[name]
            args[name] = strided(old.shape, old.dtype, rng, shift=shift)
            args[name].copy_(old)
        check_args(BASE.op, args, backend)


def test_tables_may_change_in_place(backend: Backend) -> None:
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


# --- launch faults --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op", ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"]
)
def test_any_number_of_tokens(op: str, backend: Backend) -> None:
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
def test_very_many_heads(heads: tuple[int, int], backend: Backend) -> None:
    for op in ("rope_", "rope_store_kv_", "store_kv_", "rope_store_mla_"):
        case = Case(op=op, tokens=2, heads_q=heads[0], heads_kv=heads[1], head_dim=8, latent_dim=8)
        check(case, backend)


def test_work_enough_for_every_thread(backend: Backend) -> None:
    """A call large enough to be split, with tokens that are dropped in each part."""
    for op in ("rope_store_kv_", "store_kv_", "rope_store_mla_"):
        case = Case(
            op=op, tokens=300, heads_q=9, heads_kv=3, pages=20, page_size=16, mistakes=True, seed=4
        )
        check(case, backend)


def test_every_remainder_of_a_split(backend: Backend) -> None:
    """From about where calls are split on: the last piece is whole, short, or one token."""
    for tokens in [*range(32, 42), 51, 68, 69, 133, 137, 139, 150]:
        case = Case(op="rope_store_kv_", tokens=tokens, heads_q=9, heads_kv=3, head_dim=64)
        check(replace(case, pages=10, page_size=16, mistakes=tokens % 2 == 0, seed=tokens), backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", [(128, 128), (96, 3), (67, 67)])
def test_few_wide_tokens(dtype: str, heads: tuple[int, int], backend: Backend) -> None:
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
    {"op": "store_kv_", "heads_kv": 2},
    {"op": "store_kv_", "heads_kv": 2, "layout": "HND", "pool_strides": "kv"},
    {"op": "rope_store_kv_", "heads_kv": 2},
    {"op": "rope_store_kv_", "heads_kv": 2, "layout": "HND", "k_norm": "model", "write_k": True},
]


@pytest.mark.parametrize("fields", LARGE, ids=str)
def test_stores_larger_than_the_caches(fields: dict[str, Any], backend: Backend) -> None:
    """2 to 5 MiB into the pool, in rows of less and of more than a page of memory: a kernel may
    write past the caches, whole lines at a time."""
    if backend.name == "reference":
        pytest.skip("plain torch writes all sizes alike")
    base = Case(tokens=560, heads_q=4, heads_kv=4, head_dim=512, pages=280, mistakes=True, seed=3)
    check(replace(base, **fields), backend)


# --- head counts and dims -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads", [(9, 3), (32, 8), (1, 1), (8, 1), (5, 5), (12, 4), (7, 7), (15, 3)]
)
def test_head_counts(heads: tuple[int, int], backend: Backend) -> None:
    for layout, pool_dtype in itertools.product(("NHD", "x_packed"), ("model", FP8[0])):
        case = replace(BASE, heads_q=heads[0], heads_kv=heads[1], tokens=3)
        fields = {"layout": layout, "pool_dtype": pool_dtype, "k_scale": "head"}
        check(replace(case, **fields), backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512, 576])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_head_dims(head_dim: int, interleaved: bool, dtype: str, backend: Backend) -> None:
    case = replace(BASE, head_dim=head_dim, interleaved=interleaved, dtype=dtype, tokens=3)
    check(case, backend)
    norms = {"q_norm": "float32", "k_norm": "model", "pool_dtype": FP8[0], "strides": "packed"}
    check(replace(case, **norms), backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["NHD", "HND", "slots", "x_packed", "shuffled"])
@pytest.mark.parametrize("page_size", [1, 16, 24, 40])
def test_page_sizes_that_are_no_power_of_two(layout: str, page_size: int, backend: Backend) -> None:
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
