"""FlashInfer's general library: RoPE, then append to the paged pool, or for an fp8 query and pool
both in one kernel. `flashinfer.whole-query` is that kernel for MLA, which also quantises the latent
part of the query, and so moves more. The generated kernels are in `flashinfer_generated`."""

from __future__ import annotations

from importlib import import_module

import torch

from ropool.bench.inputs import DECODE_TOKENS, PAGE, SCALE, Inputs, normal
from ropool.bench.peers.package import Package, in_turn
from ropool.bench.provider import Call
from ropool.bench.workload import Workload

FLASHINFER = Package("flashinfer-python", ("flashinfer", "tvm_ffi"))
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


def prepare(w: Workload, x: Inputs) -> None:
    x.extra["flashinfer"] = Paged(x)


# --- one kernel each ------------------------------------------------------------------------------


def rotate(w: Workload) -> Call:
    run = import_module("flashinfer.rope").apply_rope_with_cos_sin_cache_inplace
    neox, dim = not w.interleaved, w.head_dim

    def call(x: Inputs) -> None:
        position = x.extra["flashinfer"].rope_position
        run(position, x.q.flatten(1), x.k.flatten(1), dim, x.table, neox)

    return call


def append(w: Workload) -> Call:
    put = import_module("flashinfer.page").append_paged_kv_cache

    def call(x: Inputs) -> None:
        p: Paged = x.extra["flashinfer"]
        pools = (x.k_pool, x.v_pool)
        put(x.k, x.v, p.request, p.position, pools, p.pages, p.page_start, p.last_row)

    return call


def append_mla(w: Workload) -> Call:
    put, latent = import_module("flashinfer.page").append_paged_mla_kv_cache, w.latent_dim

    def call(x: Inputs) -> None:
        p: Paged = x.extra["flashinfer"]
        pools = x.k_pool[..., :latent], x.k_pool[..., latent:]
        put(x.v, x.k, p.request, p.position, *pools, p.pages, p.page_start, p.last_row)

    return call


def rotate_quantise_append(w: Workload) -> Call:
    """The scales are numbers that it multiplies by."""
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


# --- flashinfer -----------------------------------------------------------------------------------


def build(w: Workload) -> Call:
    if w.q_dtype:
        return rotate_quantise_append(w)
    if w.op == "rope_":
        return rotate(w)
    put = append_mla(w) if w.mla else append(w)
    return in_turn(rotate(w), put) if w.rotary_dim else put


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


# --- flashinfer.whole-query -----------------------------------------------------------------------


def prepare_whole(w: Workload, x: Inputs) -> None:
    prepare(w, x)
    q = normal((w.tokens, w.heads_q, w.latent_dim), x.q.dtype, x.q.device)
    x.extra["flashinfer.whole-query"] = q, torch.empty_like(q, dtype=x.q_out.dtype)


def why_not_whole(w: Workload) -> str | None:
    if w.op != "rope_store_mla_" or not w.q_dtype or w.kv_dtype != w.q_dtype:
        return "rotates, quantises and stores MLA rows only"
    return None


def latent_query_bytes(w: Workload) -> int:
    """Two read and one written for each element."""
    return 3 * w.tokens * w.heads_q * w.latent_dim


PROVIDERS = (
    FLASHINFER.provider("flashinfer", build, why_not=why_not, prepare=prepare, writes_k=True),
    FLASHINFER.provider(
        "flashinfer.whole-query",
        rotate_quantise_append,
        why_not=why_not_whole,
        prepare=prepare_whole,
        extra_bytes=latent_query_bytes,
    ),
)
