"""FlashInfer's kernels. `flashinfer` is its general library: RoPE, then append to the paged pool,
or for fp8 both in one kernel; `flashinfer.generated` are its kernels for the two head shapes that
it generates code for, which read the packed projection; `flashinfer.whole-query` is its fp8 kernel
for MLA, which also quantises the latent part of the query, and so moves more."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ropool.bench.inputs import DECODE_TOKENS, NORM_EPS, PAGE, SCALE, Inputs, normal
from ropool.bench.peers.package import needs, same_dtype_pool, version
from ropool.bench.provider import Call, Provider
from ropool.bench.workload import Workload

GENERATED_HEADS = ((8, 1, 128), (64, 8, 128))
NORM_THEN_ROPE = 2
STATIC_SCALE = 2
MLA_WIDTHS = (512, 64)


class Paged:
    """The slots of a set as the paged batch that FlashInfer takes: in a decode batch each token is
    the last one of a request of its own, a prompt is one request."""

    def __init__(self, x: Inputs) -> None:
        count = x.slots.numel()
        page, row = (x.slots // PAGE).int(), (x.slots % PAGE).int()
        device = x.slots.device
        if count <= DECODE_TOKENS:
            self.request = torch.arange(count, dtype=torch.int32, device=device)
            self.position, self.pages = row, page
            self.page_start = torch.arange(count + 1, dtype=torch.int32, device=device)
            self.last_row = row + 1
        else:
            self.request = torch.zeros(count, dtype=torch.int32, device=device)
            self.position = torch.arange(count, dtype=torch.int32, device=device)
            self.pages = page[::PAGE].contiguous()
            ends = [0, self.pages.numel()]
            self.page_start = torch.tensor(ends, dtype=torch.int32, device=device)
            self.last_row = row[-1:] + 1
        self.rope_position = x.positions.int()


class Requests:
    """The same for the generated kernels, which take a dense page table that is indexed by the
    position, and rotate by that position."""

    def __init__(self, x: Inputs) -> None:
        count = x.slots.numel()
        page = (x.slots // PAGE).int()
        device = x.slots.device
        if count <= DECODE_TOKENS:
            self.lengths = (x.positions + 1).int()
            self.start = torch.arange(count + 1, dtype=torch.int32, device=device)
            width = x.table.shape[0] // PAGE
            self.table = torch.zeros((count, width), dtype=torch.int32, device=device)
            self.table.scatter_(1, (x.positions // PAGE)[:, None], page[:, None])
        else:
            self.lengths = torch.tensor([count], dtype=torch.int32, device=device)
            self.start = torch.tensor([0, count], dtype=torch.int32, device=device)
            self.table = page[::PAGE].contiguous()[None]
        heads = x.k.shape[1]
        self.flag = torch.zeros((len(self.lengths), heads), dtype=torch.int32, device=device)
        self.q = torch.empty_like(x.q, memory_format=torch.contiguous_format)
        self.q_norm, self.k_norm = x.q_norm.float(), x.k_norm.float()
        self.multiplier = torch.full((1,), 1 / SCALE, device=device)
        self.no_scale = torch.empty(0, device=device)


def prepare(w: Workload, x: Inputs) -> None:
    x.extra["flashinfer"] = Paged(x)


def prepare_generated(w: Workload, x: Inputs) -> None:
    x.extra["flashinfer.generated"] = Requests(x)


def build(workload: Workload) -> Call:
    w = workload
    if w.q_dtype:
        return quantised(w)
    put = None if w.op == "rope_" else append(w)
    if not w.rotary_dim:
        assert put is not None
        return put
    module = import_module("flashinfer.rope")
    rotate, neox, dim = module.apply_rope_with_cos_sin_cache_inplace, not w.interleaved, w.head_dim

    def call(x: Inputs) -> None:
        q, k = x.q.flatten(1), x.k.flatten(1)
        rotate(x.extra["flashinfer"].rope_position, q, k, dim, x.table, neox)
        if put is not None:
            put(x)

    return call


def append(w: Workload) -> Call:
    module = import_module("flashinfer.page")
    if w.mla:
        write, latent = module.append_paged_mla_kv_cache, w.latent_dim

        def mla(x: Inputs) -> None:
            p: Paged = x.extra["flashinfer"]
            pool = x.k_pool
            write(
                x.v, x.k, p.request, p.position, pool[..., :latent], pool[..., latent:],
                p.pages, p.page_start, p.last_row,
            )  # fmt: skip

        return mla
    put = module.append_paged_kv_cache

    def call(x: Inputs) -> None:
        p: Paged = x.extra["flashinfer"]
        pool = (x.k_pool, x.v_pool)
        put(x.k, x.v, p.request, p.position, pool, p.pages, p.page_start, p.last_row)

    return call


def prepare_whole(w: Workload, x: Inputs) -> None:
    shape, device = (w.tokens, w.heads_q, w.latent_dim), x.q.device
    q = normal(shape, x.q.dtype, device)
    prepare(w, x)
    x.extra["flashinfer.whole-query"] = q, torch.empty(shape, dtype=x.q_out.dtype, device=device)


def quantised(w: Workload) -> Call:
    """One kernel; the scales are numbers that it multiplies by."""
    run = import_module("flashinfer.rope").rope_quantize_fp8_append_paged_kv_cache
    multiplier, latent, neox = 1 / SCALE, w.latent_dim, not w.interleaved

    def call(x: Inputs) -> None:
        p: Paged = x.extra["flashinfer"]
        pool = (x.k_pool[..., :latent], x.k_pool[..., latent:]) if w.mla else (x.k_pool, x.v_pool)
        q_latent, q_latent_out = x.extra["flashinfer.whole-query"] if w.mla else (None, None)
        run(
            x.q, x.k, q_latent, x.v if w.mla else None, None if w.mla else x.v,
            x.table, p.rope_position, pool, p.pages, p.page_start, p.request, p.position,
            is_neox=neox, quant_scale_q=multiplier, quant_scale_kv=multiplier, page_size=PAGE,
            q_rope_out=x.q_out, q_nope_out=q_latent_out, enable_pdl=True,
        )  # fmt: skip

    return call


def generated(w: Workload) -> Call:
    """Unused rows of a request's last page are left alone where that can be asked for, which the
    fp8 kernel does not let one do."""
    policy = NORM_THEN_ROPE if w.norm else 0
    if w.q_dtype:
        run_fp8 = import_module(
            "flashinfer.cake_fused_qk_rope_fp8_append"
        ).cake_fused_qk_rmsnorm_rope_quantize_fp8_append_paged_kv_cache

        def fp8(x: Inputs) -> Tensor:
            r: Requests = x.extra["flashinfer.generated"]
            run_fp8(
                x.packed, x.table, r.lengths, r.start, r.table, (x.k_pool, x.v_pool),
                w.tokens > DECODE_TOKENS, x.scale, x.scale, STATIC_SCALE,
                q_scale_inv=r.multiplier, out_q=x.q_out, q_scale=r.no_scale, split_k_flag=r.flag,
                qk_norm_policy=policy, q_norm_weight=r.q_norm if w.norm else None,
                k_norm_weight=r.k_norm if w.norm else None,
            )  # fmt: skip
            return x.q_out

        return fp8
    run = import_module(
        "flashinfer.cake_fused_qk_rope_append"
    ).cake_fused_qk_rmsnorm_rope_append_paged_kv_cache

    def call(x: Inputs) -> Tensor:
        r: Requests = x.extra["flashinfer.generated"]
        run(
            x.packed, x.table, r.lengths, r.start, r.table, x.k_pool, x.v_pool,
            num_q_heads=w.heads_q, num_kv_heads=w.heads_kv, qk_norm_policy=policy,
            q_norm_weight=r.q_norm if w.norm else None, k_norm_weight=r.k_norm if w.norm else None,
            eps=NORM_EPS, out_q=r.q, clear_unused_last_page_rows=False,
        )  # fmt: skip
        return r.q

    return call


def why_not(w: Workload) -> str | None:
    if w.norm:
        return "its general kernels have no norm"
    if w.mla and w.q_dtype:
        return "quantises the whole query, see flashinfer.whole-query"
    if w.fp8 != bool(w.q_dtype):
        return "quantises query and pool together"
    if w.kv_dtype == "fp8_ds_mla":
        return "has no 656-byte row"
    if w.mla and (w.latent_dim, w.head_dim) != MLA_WIDTHS:
        return "appends MLA rows of 512 + 64 only"
    if w.dtype == "float32":
        return "takes half-precision models only"
    return None


def why_not_generated(w: Workload) -> str | None:
    if w.op != "rope_store_kv_" or (w.heads_q, w.heads_kv, w.head_dim) not in GENERATED_HEADS:
        return "is generated for rotate-and-store at 8x1x128 and 64x8x128 only"
    if w.dtype != "bfloat16":
        return "takes bfloat16 models only"
    if not (same_dtype_pool(w) or (w.kv_dtype == w.q_dtype == "float8_e4m3fn")):
        return "quantises query and pool together"
    return None


def why_not_whole(w: Workload) -> str | None:
    if w.op != "rope_store_mla_" or not w.q_dtype or w.kv_dtype != w.q_dtype:
        return "rotates, quantises and stores MLA rows only"
    return None


_version = version("flashinfer-python")
_installed = needs("flashinfer", "tvm_ffi")
PROVIDERS = (
    Provider(
        name="flashinfer",
        version=_version,
        unavailable=_installed,
        build=build,
        why_not=why_not,
        prepare=prepare,
        writes_k=True,
    ),
    Provider(
        name="flashinfer.generated",
        version=_version,
        unavailable=_installed,
        build=generated,
        why_not=why_not_generated,
        prepare=prepare_generated,
        clears_pages=True,
    ),
    Provider(
        name="flashinfer.whole-query",
        version=_version,
        unavailable=_installed,
        build=quantised,
        why_not=why_not_whole,
        prepare=prepare_whole,
        extra_bytes=lambda w: 3 * w.tokens * w.heads_q * w.latent_dim,
    ),
)
