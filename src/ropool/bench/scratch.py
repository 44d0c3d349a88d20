"""Calls on tensors of their own, as a model makes them: what a tuner runs the ops on, since most of
them change their arguments."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ropool.bench.inputs import (
    DECODE_TOKENS,
    MAX_POSITION,
    PAGE,
    heads_in,
    make_indices,
    make_table,
    normal,
)
from ropool.bench.workload import Workload, combine, parse_heads
from ropool.errors import RopoolError
from ropool.kvcache.mla import DS_MLA_BYTES, DS_MLA_DIMS

_STORING = ("rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_")
_ROTATING = ("rope_store_kv_", "rope_store_mla_")
_PARTS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "norm": ({"norm"}, ("rope_store_kv_",)),
    "fp8": ({"pool", "query"}, _STORING),
    "fp8_pool": ({"pool"}, _ROTATING),
    "fp8_ds_mla": ({"pool"}, ("store_mla_", "rope_store_mla_")),
    "q_out": ({"query"}, _ROTATING),
    "write_k": ({"key"}, _ROTATING),
}
"""What each part of a variant decides, and the ops that it goes with."""
VARIANTS = ("plain", *_PARTS)
"""`norm`: RMSNorm of queries and keys; `fp8`: pool and rotated queries in float8_e4m3fn with
scales; `fp8_pool`: the pool alone; `fp8_ds_mla`: rows of 656 bytes; `q_out`: rotated queries go to
a tensor of their own; `write_k`: rotated keys are written back too. Several are joined by `+`."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One op on one shape in one variant; with a number of tokens it is a call."""

    op: str
    heads: str
    """`32x8x128`, with `/64` behind it when 64 dims are rotated, or `128x512+64` for the MLA ops.
    """
    dtype: str
    variant: str

    def describe(self) -> str:
        return f"{self.op} {self.heads} {self.dtype} {self.variant}"

    @property
    def parts(self) -> tuple[str, ...]:
        """What the variant is made of."""
        return () if self.variant == "plain" else tuple(self.variant.split("+"))


def subject(op: str, heads: str, dtype: str, variant: str) -> Subject | None:
    """The subject, or `None` when these do not go together."""
    shape = combine(op, shape_of(heads), dtype, "auto", 1)
    found = Subject(op, heads, dtype, variant)
    decided: set[str] = set()
    fits = shape is not None and (op.startswith("rope") or "/" not in heads)
    for part in found.parts:
        if part not in _PARTS:
            raise RopoolError(
                f"tune: variant is {variant!r}; known: {', '.join(VARIANTS)}, "
                "or several joined by +"
            )
        decides, ops = _PARTS[part]
        fits = fits and op in ops and not decides & decided
        decided |= decides
    if shape is not None and "fp8_ds_mla" in found.parts:
        fits = fits and (shape.latent_dim, shape.head_dim) == DS_MLA_DIMS
    return found if fits else None


def shape_of(heads: str) -> Workload:
    """The shape in `heads`. Raises `RopoolError` for a form that is none."""
    form, slash, rotated = heads.partition("/")
    shape = parse_heads(form, "tune")
    if not slash:
        return shape
    rotary_dim = int(rotated) if rotated.isdecimal() and len(rotated) < 6 else 0
    if shape.mla or not 0 < rotary_dim <= shape.head_dim or rotary_dim % 2:
        raise RopoolError(
            f"tune: heads are {heads!r}; allowed behind the slash of HqxHkxD/R: an even number "
            "from 2 to D"
        )
    return replace(shape, rotary_dim=rotary_dim)


def arguments(subject: Subject, tokens: int, device: torch.device) -> dict[str, Any]:
    """Arguments of one call. Queries, keys and values are views of one packed projection, positions
    and slots those of a decode batch or of a prompt, as `make_indices` has them."""
    shape = shape_of(subject.heads)
    dtype = getattr(torch, subject.dtype)
    parts = subject.parts
    packed_row = "fp8_ds_mla" in parts
    fp8 = "fp8" in parts or "fp8_pool" in parts
    pool_dtype = torch.float8_e4m3fn if fp8 else torch.uint8 if packed_row else dtype
    rows = max(MAX_POSITION, tokens)
    pages = 2 * (tokens if tokens <= DECODE_TOKENS else -(-tokens // PAGE))
    positions, mapping = (x.to(device) for x in make_indices(tokens, rows, pages))
    slots = pages * PAGE
    rotation: dict[str, Any] = {}
    if subject.op.startswith("rope"):
        rotation = {"cos_sin_cache": table(rows, shape.rotary_dim, device), "positions": positions}
    call = _mla(shape, tokens, dtype, device) if shape.mla else _kv(shape, tokens, dtype, device)
    q = call.pop("q_rope" if shape.mla else "q")
    if rotation:
        call["q_rope" if shape.mla else "q"] = q
        if "fp8" in parts or "q_out" in parts:
            q_dtype = pool_dtype if fp8 else dtype
            call["q_out"] = torch.empty(q.shape, dtype=q_dtype, device=device)
        if "fp8" in parts:
            call["q_scale"] = torch.ones(1, device=device)
    call |= rotation
    if subject.op == "rope_":
        del call["v"]
        return call
    call["slot_mapping"] = mapping
    if "write_k" in parts:
        call["write_k"] = True
    if shape.mla:
        width = DS_MLA_BYTES if packed_row else shape.latent_dim + shape.head_dim
        call["pool"] = torch.zeros(slots, width, dtype=pool_dtype, device=device)
        return call | ({"scale": torch.ones(1, device=device)} if fp8 else {})
    pool = (slots, shape.heads_kv, shape.head_dim)
    call |= {f"{part}_pool": torch.zeros(pool, dtype=pool_dtype, device=device) for part in "kv"}
    call["layout"] = "slots"
    if fp8:
        call |= {f"{part}_scale": torch.ones(1, device=device) for part in "kv"}
    if "norm" in parts:
        weight = torch.rand(shape.head_dim, device=device).to(dtype) + 0.5
        call |= {f"{part}_norm_weight": weight for part in "qk"}
    return call


@functools.lru_cache(maxsize=1)
def table(rows: int, rotary_dim: int, device: torch.device) -> Tensor:
    """The default cos/sin table, which all calls of a model share."""
    return make_table(rows, rotary_dim, device)


def _kv(shape: Workload, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    heads = shape.heads_q + 2 * shape.heads_kv
    packed = normal((tokens, heads * shape.head_dim), dtype, device)
    return dict(zip("qkv", heads_in(packed, shape.heads_q, shape.heads_kv), strict=True))


def _mla(shape: Workload, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        "q_rope": normal((tokens, shape.heads_q, shape.head_dim), dtype, device),
        "k_nope": normal((tokens, shape.latent_dim), dtype, device),
        "k_rope": normal((tokens, shape.head_dim), dtype, device),
    }
