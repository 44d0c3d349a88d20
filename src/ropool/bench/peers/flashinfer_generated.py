"""The kernels that FlashInfer generates code for, at two head shapes: they read the packed
projection, normalise if asked, rotate and append, in one launch."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ropool.bench.inputs import DECODE_TOKENS, NORM_EPS, PAGE, SCALE, Inputs
from ropool.bench.peers.flashinfer import FLASHINFER
from ropool.bench.peers.package import same_dtype_pool
from ropool.bench.provider import Call
from ropool.bench.workload import Workload

NAME = "flashinfer.generated"
HEADS = ((8, 1, 128), (64, 8, 128))
NO_NORM, NORM_THEN_ROPE = 0, 2
STATIC_SCALE = 2


class Requests:
    """The slots of a set as the dense page table that these kernels index by the position; they
    rotate by that position too."""

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

    def norm(self, w: Workload) -> dict[str, int | Tensor | None]:
        """What both kernels are told of the norm."""
        return {
            "qk_norm_policy": NORM_THEN_ROPE if w.norm else NO_NORM,
            "q_norm_weight": self.q_norm if w.norm else None,
            "k_norm_weight": self.k_norm if w.norm else None,
        }


def prepare(w: Workload, x: Inputs) -> None:
    x.extra[NAME] = Requests(x)


def build(w: Workload) -> Call:
    return to_fp8(w) if w.q_dtype else as_it_is(w)


def as_it_is(w: Workload) -> Call:
    """Unused rows of a request's last page are left alone."""
    module = import_module("flashinfer.cake_fused_qk_rope_append")
    run = module.cake_fused_qk_rmsnorm_rope_append_paged_kv_cache

    def call(x: Inputs) -> Tensor:
        r: Requests = x.extra[NAME]
        run(
            x.packed, x.table, r.lengths, r.start, r.table, x.k_pool, x.v_pool,
            num_q_heads=w.heads_q, num_kv_heads=w.heads_kv, **r.norm(w),
            eps=NORM_EPS, out_q=r.q, clear_unused_last_page_rows=False,
        )  # fmt: skip
        return r.q

    return call


def to_fp8(w: Workload) -> Call:
    """Query and pool. Clears unused rows of a request's last page, and cannot be told not to."""
    module = import_module("flashinfer.cake_fused_qk_rope_fp8_append")
    run = module.cake_fused_qk_rmsnorm_rope_quantize_fp8_append_paged_kv_cache
    prefill = w.tokens > DECODE_TOKENS

    def call(x: Inputs) -> Tensor:
        r: Requests = x.extra[NAME]
        run(
            x.packed, x.table, r.lengths, r.start, r.table, (x.k_pool, x.v_pool), prefill,
            x.scale, x.scale, STATIC_SCALE, q_scale_inv=r.multiplier, out_q=x.q_out,
            q_scale=r.no_scale, split_k_flag=r.flag, **r.norm(w),
        )  # fmt: skip
        return x.q_out

    return call


def why_not(w: Workload) -> str | None:
    if w.op != "rope_store_kv_" or (w.heads_q, w.heads_kv, w.head_dim) not in HEADS:
        return "is generated for rotate-and-store at 8x1x128 and 64x8x128 only"
    if w.dtype != "bfloat16":
        return "takes bfloat16 models only"
    if not (same_dtype_pool(w) or (w.kv_dtype == w.q_dtype == "float8_e4m3fn")):
        return "quantises query and pool together"
    return None


PROVIDERS = (FLASHINFER.provider(NAME, build, why_not=why_not, prepare=prepare, clears_pages=True),)
