"""SGLang's kernels for NVIDIA GPUs: its fused RoPE and store where that serves the call, otherwise
RoPE and store one after the other. Beside that, each a provider of its own:

- `sglang.unfused` rotates and stores apart where `sglang` would fuse;
- `sglang.pool` divides, casts and stores for an fp8 pool in the steps of SGLang's own pool, where
  `sglang` takes its Triton kernel that divides and stores at once;
- `sglang.triton` is the Triton kernel that it runs on AMD GPUs;
- `sglang-0.5.20.tma` is the MLA write of an older release, looked for as the package
  `sglang_0_5_20`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from ropool.bench.inputs import NORM_EPS, Inputs
from ropool.bench.peers.package import Package, in_turn, needs, same_dtype_pool
from ropool.bench.provider import Call, Provider
from ropool.bench.workload import Workload

SGLANG = Package("sglang", ("sglang", "tvm_ffi"))
FUSED_WIDTHS = NORM_WIDTHS = (64, 128, 256)
ROPE_BASE = 10000.0
"""The kernel that norms computes its angles itself; this is the base of the bench's table."""
NOT_RESERVED = -1
"""Slot 0 is an ordinary slot."""


def kernels(module: str, package: str = "sglang") -> Any:
    """A module of SGLang's kernels, such as `attention.rope`."""
    return import_module(f"{package}.kernels.ops.{module}")


def rows(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The pools as `[S, Hk D]`."""
    return x.k_slots.flatten(1), x.v_slots.flatten(1)


# --- one kernel each ------------------------------------------------------------------------------


def rotate(w: Workload) -> Call:
    run, neox = kernels("attention.rope").apply_rope_inplace, not w.interleaved
    return lambda x: run(x.q, x.k, x.table, x.positions, is_neox=neox)


def norm_and_rotate(w: Workload) -> Call:
    """On the packed projection."""
    run = kernels("attention.fused_qknorm_rope").fused_qk_norm_rope
    heads = (w.heads_q, w.heads_kv, w.heads_kv, w.head_dim)

    def call(x: Inputs) -> None:
        run(
            x.packed, *heads, NORM_EPS, x.q_norm, x.k_norm, ROPE_BASE, not w.interleaved,
            x.extra["sglang"], 1.0, 0.0, 0.0, 1.0, w.rotary_dim,
        )  # fmt: skip

    return call


def prepare(w: Workload, x: Inputs) -> None:
    if w.norm:
        x.extra["sglang"] = x.positions.int()


def store(w: Workload) -> Call:
    return divide_and_store() if w.fp8 else store_as_it_is()


def store_as_it_is() -> Call:
    put = kernels("kvcache.kvcache").store_cache

    def call(x: Inputs) -> None:
        k, v = x.k.flatten(1), x.v.flatten(1)
        put(k, v, *rows(x), x.slots, reserved_skip_index=NOT_RESERVED)

    return call


def divide_and_store() -> Call:
    put = kernels("kvcache.cache_ops").launch_reshape_and_cache_flash
    return lambda x: put(x.k, x.v, x.k_pool, x.v_pool, x.slots, None, x.scale, x.scale)


def store_mla(package: str) -> Call:
    put = kernels("kvcache.set_mla_kv_buffer", package).set_mla_kv_buffer
    return lambda x: put(x.k_slots, x.slots, x.v, x.k, reserved_skip_index=NOT_RESERVED)


def rotate_and_store(w: Workload) -> Call:
    run, neox = kernels("attention.rope").apply_rope_inplace_with_kvcache, not w.interleaved
    return lambda x: run(x.q, x.k, x.v, *rows(x), x.table, x.positions, x.slots, is_neox=neox)


# --- sglang ---------------------------------------------------------------------------------------


def build(w: Workload) -> Call:
    if w.op == "store_mla_":
        return store_mla("sglang")
    if w.op == "store_kv_":
        return store(w)
    if w.op == "rope_":
        return rotate(w)
    if w.norm:
        return in_turn(norm_and_rotate(w), store(w))
    if same_dtype_pool(w) and w.head_dim in FUSED_WIDTHS:
        return rotate_and_store(w)
    return unfused(w)


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


# --- sglang.unfused -------------------------------------------------------------------------------


def unfused(w: Workload) -> Call:
    return in_turn(rotate(w), store(w))


def why_not_unfused(w: Workload) -> str | None:
    if w.op != "rope_store_kv_" or w.norm or w.q_dtype or w.fp8:
        return "is another way to rotate and store; for the others see sglang"
    return None


# --- sglang.pool ----------------------------------------------------------------------------------


def pool(w: Workload) -> Call:
    """Not in place, unlike SGLang's division, since the inputs serve more than once."""
    put, dtype = kernels("kvcache.kvcache").store_cache, getattr(torch, w.kv_dtype)

    def divide_cast_store(x: Inputs) -> None:
        assert x.scale is not None
        k, v = ((part / x.scale).to(dtype).view(torch.uint8).flatten(1) for part in (x.k, x.v))
        put(k, v, *rows(x), x.slots, reserved_skip_index=NOT_RESERVED)

    return in_turn(rotate(w), divide_cast_store)


def why_not_pool(w: Workload) -> str | None:
    if w.op != "rope_store_kv_" or not w.fp8 or w.norm or w.q_dtype:
        return "rotates and stores into fp8 pools; for the others see sglang"
    return None


# --- sglang.triton --------------------------------------------------------------------------------


def triton(w: Workload) -> Call:
    """Its own output tensors are made outside of the call, and no zeros are asked for."""
    module = kernels("attention.fused_qk_rope_reshape_and_cache")
    run, neox = module.fused_qk_rope_reshape_and_cache, not w.interleaved

    def call(x: Inputs) -> None:
        run(
            x.q, x.k, x.v, x.k_pool, x.v_pool, x.slots, x.positions, x.table, x.scale, x.scale,
            neox, True, apply_scale=w.fp8, q_out=x.q, k_out=x.k, output_zeros=False,
        )  # fmt: skip

    return call


def why_not_triton(w: Workload) -> str | None:
    if w.op != "rope_store_kv_" or w.norm or w.q_dtype:
        return "rotates and stores only"
    if w.head_dim & (w.head_dim - 1):
        return "needs a head dimension that is a power of 2"
    return None


# --- sglang-0.5.20.tma ----------------------------------------------------------------------------


def why_not_tma(w: Workload) -> str | None:
    return why_not(w) if w.op == "store_mla_" else "writes MLA rows only"


PROVIDERS = (
    SGLANG.provider("sglang", build, why_not=why_not, prepare=prepare, writes_k=True),
    SGLANG.provider("sglang.unfused", unfused, why_not=why_not_unfused, writes_k=True),
    SGLANG.provider("sglang.pool", pool, why_not=why_not_pool, writes_k=True),
    SGLANG.provider("sglang.triton", triton, why_not=why_not_triton, writes_k=True),
    Provider(
        name="sglang-0.5.20.tma",
        version=lambda: "sglang 0.5.20",
        unavailable=needs("sglang_0_5_20", "tvm_ffi"),
        build=lambda workload: store_mla("sglang_0_5_20"),
        why_not=why_not_tma,
    ),
)
