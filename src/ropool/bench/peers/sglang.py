"""SGLang's kernels. `sglang` is what it runs on NVIDIA GPUs: its fused RoPE and store where that
serves the call, otherwise RoPE and store one after the other; `sglang.triton` is the kernel that it
runs on AMD GPUs; `sglang.unfused` always rotates and stores apart; `sglang.pool` divides, casts and
stores for an fp8 pool in the steps of SGLang's own pool, where `sglang` takes its Triton kernel
that divides and stores at once; `sglang-0.5.20.tma` is the MLA write of an older release, looked
for as the package `sglang_0_5_20`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from ropool.bench.inputs import NORM_EPS, Inputs
from ropool.bench.peers.package import needs, same_dtype_pool, version
from ropool.bench.provider import Call, Provider
from ropool.bench.workload import Workload

FUSED_WIDTHS = (64, 128, 256)
NORM_WIDTHS = (64, 128, 256)
ROPE_BASE = 10000.0
"""The kernel that norms computes its angles itself; this is the base of the bench's table."""
NOT_RESERVED = -1
"""Slot 0 is an ordinary slot."""


def rows(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The pools as `[S, Hk D]`."""
    return x.k_slots.flatten(1), x.v_slots.flatten(1)


def build(workload: Workload) -> Call:
    w = workload
    if w.op == "store_mla_":
        return mla_write("sglang")
    if w.op == "store_kv_":
        return store(w)
    if w.norm:
        return norm_then_store(w)
    if w.op == "rope_store_kv_" and same_dtype_pool(w) and w.head_dim in FUSED_WIDTHS:
        return fused(w)
    return unfused(w)


def fused(w: Workload) -> Call:
    run = import_module("sglang.kernels.ops.attention.rope").apply_rope_inplace_with_kvcache
    neox = not w.interleaved

    def call(x: Inputs) -> None:
        k_rows, v_rows = rows(x)
        run(x.q, x.k, x.v, k_rows, v_rows, x.table, x.positions, x.slots, is_neox=neox)

    return call


def unfused(w: Workload) -> Call:
    rotate = import_module("sglang.kernels.ops.attention.rope").apply_rope_inplace
    neox = not w.interleaved
    put = None if w.op == "rope_" else mla_write("sglang") if w.mla else store(w)

    def call(x: Inputs) -> None:
        k = x.k.unsqueeze(1) if x.k.dim() == 2 else x.k
        rotate(x.q, k, x.table, x.positions, is_neox=neox)
        if put is not None:
            put(x)

    return call


def store(w: Workload) -> Call:
    if w.fp8:
        launch = import_module(
            "sglang.kernels.ops.kvcache.cache_ops"
        ).launch_reshape_and_cache_flash

        def scaled(x: Inputs) -> None:
            launch(x.k, x.v, x.k_pool, x.v_pool, x.slots, None, x.scale, x.scale)

        return scaled
    put = import_module("sglang.kernels.ops.kvcache.kvcache").store_cache

    def call(x: Inputs) -> None:
        k_rows, v_rows = rows(x)
        put(
            x.k.flatten(1), x.v.flatten(1), k_rows, v_rows, x.slots,
            reserved_skip_index=NOT_RESERVED,
        )  # fmt: skip

    return call


def pool(w: Workload) -> Call:
    """Not in place, unlike SGLang's division, since the inputs serve more than once."""
    module = "sglang.kernels.ops"
    rotate = import_module(f"{module}.attention.rope").apply_rope_inplace
    put = import_module(f"{module}.kvcache.kvcache").store_cache
    dtype, neox = getattr(torch, w.kv_dtype), not w.interleaved

    def call(x: Inputs) -> None:
        rotate(x.q, x.k, x.table, x.positions, is_neox=neox)
        assert x.scale is not None
        k, v = ((part / x.scale).to(dtype).view(torch.uint8).flatten(1) for part in (x.k, x.v))
        put(k, v, *rows(x), x.slots, reserved_skip_index=NOT_RESERVED)

    return call


def norm_then_store(w: Workload) -> Call:
    """The norm and the rotation in one kernel on the packed projection, then the store."""
    norm_rope = import_module("sglang.kernels.ops.attention.fused_qknorm_rope").fused_qk_norm_rope
    put = store(w)
    heads = (w.heads_q, w.heads_kv, w.heads_kv, w.head_dim)

    def call(x: Inputs) -> None:
        norm_rope(
            x.packed, *heads, NORM_EPS, x.q_norm, x.k_norm, ROPE_BASE, not w.interleaved,
            x.extra["sglang"], 1.0, 0.0, 0.0, 1.0, w.rotary_dim,
        )  # fmt: skip
        put(x)

    return call


def mla_write(package: str) -> Call:
    module: Any = import_module(f"{package}.kernels.ops.kvcache.set_mla_kv_buffer")
    put = module.set_mla_kv_buffer

    def call(x: Inputs) -> None:
        put(x.k_slots, x.slots, x.v, x.k, reserved_skip_index=NOT_RESERVED)

    return call


def triton(w: Workload) -> Call:
    """Its own output tensors are made outside of the call, and no zeros are asked for."""
    run = import_module(
        "sglang.kernels.ops.attention.fused_qk_rope_reshape_and_cache"
    ).fused_qk_rope_reshape_and_cache
    neox = not w.interleaved

    def call(x: Inputs) -> None:
        run(
            x.q, x.k, x.v, x.k_pool, x.v_pool, x.slots, x.positions, x.table, x.scale, x.scale,
            neox, True, apply_scale=w.fp8, q_out=x.q, k_out=x.k, output_zeros=False,
        )  # fmt: skip

    return call


def prepare(w: Workload, x: Inputs) -> None:
    if w.norm:
        x.extra["sglang"] = x.positions.int()


def why_not(w: Workload) -> str | None:
    if w.mla:
        if w.op != "store_mla_" or not same_dtype_pool(w):
            return "writes MLA rows of the model's dtype only, and rotates in another call"
        return None
    if w.q_dtype:
        return "has no fp8 query"
    if w.norm and (w.dtype != "bfloat16" or w.head_dim not in NORM_WIDTHS):
        return f"norms bfloat16 heads of {NORM_WIDTHS} only"
    return None


def why_not_unfused(w: Workload) -> str | None:
    if w.op != "rope_store_kv_" or w.norm or w.q_dtype or w.fp8:
        return "is another way to rotate and store; for the others see sglang"
    return None


def why_not_pool(w: Workload) -> str | None:
    if w.op != "rope_store_kv_" or not w.fp8 or w.norm or w.q_dtype:
        return "rotates and stores into fp8 pools; for the others see sglang"
    return None


def why_not_triton(w: Workload) -> str | None:
    if w.op != "rope_store_kv_" or w.norm or w.q_dtype:
        return "rotates and stores only"
    if w.head_dim & (w.head_dim - 1):
        return "needs a head dimension that is a power of 2"
    return None


def why_not_tma(w: Workload) -> str | None:
    return why_not(w) if w.op == "store_mla_" else "writes MLA rows only"


_version = version("sglang")
_installed = needs("sglang", "tvm_ffi")
PROVIDERS = (
    Provider(
        name="sglang",
        version=_version,
        unavailable=_installed,
        build=build,
        why_not=why_not,
        prepare=prepare,
        writes_k=True,
    ),
    Provider(
        name="sglang.unfused",
        version=_version,
        unavailable=_installed,
        build=unfused,
        why_not=why_not_unfused,
        writes_k=True,
    ),
    Provider(
        name="sglang.pool",
        version=_version,
        unavailable=_installed,
        build=pool,
        why_not=why_not_pool,
        writes_k=True,
    ),
    Provider(
        name="sglang.triton",
        version=_version,
        unavailable=_installed,
        build=triton,
        why_not=why_not_triton,
        writes_k=True,
    ),
    Provider(
        name="sglang-0.5.20.tma",
        version=lambda: "sglang 0.5.20",
        unavailable=needs("sglang_0_5_20", "tvm_ffi"),
        build=lambda workload: mla_write("sglang_0_5_20"),
        why_not=why_not_tma,
    ),
)
