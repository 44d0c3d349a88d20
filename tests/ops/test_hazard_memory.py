"""What goes wrong with memory: strides, odd row lengths, tensors that share a storage.

Addresses past 32 bits: test_large_addresses.py. Accesses past an end: test_guard_pages.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import ropool
from ops.backend import BACKENDS, Backend, require
from ops.calls import FP8, Case, altered, arguments, check, check_args
from ops.memory import placed, poisoned, strided
from oracle import expected

BASE = Case(op="rope_store_kv_")
MLA = Case(op="rope_store_mla_", heads_q=3, head_dim=64, row_format="fp8_ds_mla")


# --- strides --------------------------------------------------------------------------------------


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
def test_each_tensor_has_its_own_strides(
    heads: tuple[int, int], dtype: str, backend: Backend
) -> None:
    for q_out, write_k in itertools.product([None, "model"], [False, True]):
        _separate_strides(
            backend, heads_q=heads[0], heads_kv=heads[1], dtype=dtype, q_out=q_out, write_k=write_k
        )


@pytest.mark.parametrize(
    "op", ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"]
)
@pytest.mark.parametrize("strides", ["packed", "odd", "heads_first", "random"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_strided_views(op: str, strides: str, dtype: str, backend: Backend) -> None:
    for heads, head_dim, seed in [
        ((4, 2), 64, 0),
        ((1, 1), 80, 1),
        ((9, 3), 38, 2),
        ((5, 5), 10, 3),
    ]:
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
def test_strides_of_size_one_dimensions_mean_nothing(stride: int, backend: Backend) -> None:
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
def test_rows_that_fill_no_block(dtype: str, backend: Backend) -> None:
    """Every head dim up to two vectors and some, so that each remainder of a loop occurs."""
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


def test_inputs_that_repeat_one_head(backend: Backend) -> None:
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
def test_pool_views(layout: str, pool_strides: str, pool_dtype: str, backend: Backend) -> None:
    for op in ("store_kv_", "rope_store_kv_"):
        case = Case(op=op, layout=layout, pool_strides=pool_strides, pool_dtype=pool_dtype)
        check(replace(case, pages=10, page_size=8, tokens=9, heads_kv=4), backend)


# --- aliasing -------------------------------------------------------------------------------------


def test_arguments_that_share_a_storage(backend: Backend) -> None:
    """Q, K, V of one projection, planes of one pool; q_out in a gap of the projection's rows."""
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


def test_the_cpu_kernels_refuse_a_tensor_without_memory() -> None:
    """Its metadata says otherwise, and reading it would end the process."""
    backend = next(backend for backend in BACKENDS if backend.name == "cpu")
    require(backend)
    args = placed(arguments(BASE), backend.device)
    args["v_pool"] = args["v_pool"].clone()
    ropool.rope_store_kv_(**args, backend="cpu")
    args["v_pool"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="v_pool has no memory"):
        ropool.rope_store_kv_(**args, backend="cpu")


def test_expected_counts_are_not_empty() -> None:
    """The base calls of this file do write: a test that compares nothing passes by accident."""
    for case in (BASE, MLA):
        assert all(
            result.written.any() or result.arg in ("k", "k_rope")
            for result in expected(case.op, arguments(case))
        )


# --- bits of what is only moved -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rotary", [0, 32])
def test_what_is_not_turned_keeps_its_bits(
    rotary: int, dtype: torch.dtype, backend: Backend
) -> None:
    """A pass through arithmetic would quieten NaN and drop its payload."""
    rng, device = np.random.default_rng(0), backend.device
    k, v, k_pool, v_pool = (
        poisoned(tokens * 2 * 64, dtype, rng).view(tokens, 2, 64).to(device)
        for tokens in (5, 5, 9, 9)
    )
    slots = torch.tensor([3, 0, 8, 7, 2], device=device)
    call: dict[str, Any] = {
        "k": k,
        "v": v,
        "k_pool": k_pool,
        "v_pool": v_pool,
        "slot_mapping": slots,
        "layout": "slots",
        "backend": backend.name,
    }
    if rotary:
        q = torch.zeros(5, 4, 64, dtype=dtype, device=device)
        table = torch.ones(16, rotary, dtype=torch.float32, device=device)
        positions = torch.arange(5, device=device)
        ropool.rope_store_kv_(q=q, cos_sin_cache=table, positions=positions, **call)
    else:
        ropool.store_kv_(**call)
    size = torch.empty(0, dtype=dtype).element_size()
    words = {2: torch.int16, 4: torch.int32}[size]
    assert torch.equal(k_pool[slots, :, rotary:].view(words), k[:, :, rotary:].view(words))
    assert torch.equal(v_pool[slots].view(words), v.view(words))
