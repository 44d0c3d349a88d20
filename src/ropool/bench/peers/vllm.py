"""vLLM's kernels: `rotary_embedding`, then `reshape_and_cache_flash` or `concat_and_cache_mla`;
with a norm, its one kernel for norm, rotation and cache. They are looked for in the module
`vllm._C_stable_libtorch`, which registers them with PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from ropool.bench.inputs import NORM_EPS, Inputs
from ropool.bench.peers.package import Package, in_turn, same_dtype_pool
from ropool.bench.provider import Call
from ropool.bench.workload import Workload

MODULE = "vllm._C_stable_libtorch"


def ops() -> tuple[Any, Any]:
    """The registered ops: the general ones, and those of the cache."""
    import_module(MODULE)
    return torch.ops._C, torch.ops._C_cache_ops


def prepare(w: Workload, x: Inputs) -> None:
    if w.norm:
        cos, sin = x.table.to(x.q.dtype).chunk(2, dim=-1)
        outputs = [
            torch.empty_like(heads, memory_format=torch.contiguous_format).flatten(1)
            for heads in (x.q, x.k, x.v)
        ]
        x.extra["vllm"] = (*outputs, cos.contiguous(), sin.contiguous())
    elif "vllm" not in x.extra:
        # The cache has the query's dtype here; the scale is a tensor even where it is not used.
        one = torch.ones(1, device=x.slots.device)
        x.extra["vllm"] = (x.table.to(x.q.dtype), x.scale if w.fp8 else one)


def build(workload: Workload) -> Call:
    w = workload
    general, cache = ops()
    stored = "auto" if same_dtype_pool(w) else "fp8"
    if w.kv_dtype == "fp8_ds_mla":
        stored = "fp8_ds_mla"
    dim, neox = w.head_dim, not w.interleaved

    def norm(x: Inputs) -> torch.Tensor:
        q, k, v, cos, sin = x.extra["vllm"]
        general.fused_qknorm_rope_cache(
            q, k, v, x.packed, x.q_norm, x.k_norm, cos, sin, x.positions, x.slots,
            x.k_pool, x.v_pool, dim, w.heads_q, w.heads_kv, w.rotary_dim // 2, NORM_EPS, 0.0,
            stored, None, None,
        )  # fmt: skip
        return q.view(x.q.shape)

    def rotate(x: Inputs) -> None:
        table, _ = x.extra["vllm"]
        k = x.k.unsqueeze(1) if w.mla else x.k
        general.rotary_embedding(x.positions, x.q, k, dim, table, neox, 0, False)

    def put(x: Inputs) -> None:
        _, scale = x.extra["vllm"]
        if w.mla:
            pool = x.k_pool if w.kv_dtype != "float8_e4m3fn" else x.k_pool.view(torch.uint8)
            cache.concat_and_cache_mla(x.v, x.k, pool, x.slots, stored, scale, False)
            return
        pools = (x.k_pool, x.v_pool)
        if w.fp8:
            pools = (x.k_pool.view(torch.uint8), x.v_pool.view(torch.uint8))
        cache.reshape_and_cache_flash(x.k, x.v, *pools, x.slots, stored, scale, scale)

    if w.norm:
        return norm
    if w.op == "rope_":
        return rotate
    return in_turn(rotate, put) if w.rotary_dim else put


def why_not(w: Workload) -> str | None:
    if w.q_dtype:
        return "has no fp8 query in this step"
    if w.kv_dtype == "float8_e5m2":
        return "takes e4m3 pools here"
    if w.norm and not same_dtype_pool(w):
        return "norms with a pool of the model's dtype here"
    return None


VLLM = Package("vllm", ("vllm",))
PROVIDERS = (VLLM.provider("vllm", build, why_not=why_not, prepare=prepare, writes_k=True),)
