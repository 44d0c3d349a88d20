"""Calls on tensors of their own, as a model makes them: what a tuner runs the ops on, since most of
them change their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropool.bench.workload import Workload, combine, parse_heads
from ropool.errors import RopoolError

MAX_POSITION = 8192
VARIANTS = ("plain", "norm", "fp8", "write_k")
"""`norm`: RMSNorm of queries and keys; `fp8`: pool and rotated queries in float8_e4m3fn with
scales; `write_k`: rotated keys are written back too."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One op on one shape in one variant; with a number of tokens it is a call."""

    op: str
    heads: str
    """`32x8x128`, or `128x512+64` for the MLA ops."""
    dtype: str
    variant: str

    def describe(self) -> str:
        return f"{self.op} {self.heads} {self.dtype} {self.variant}"


def subject(op: str, heads: str, dtype: str, variant: str) -> Subject | None:
    """The subject, or `None` when these do not go together."""
    shape = combine(op, parse_heads(heads, "tune"), dtype, "auto", 1)
    if variant not in VARIANTS:
        raise RopoolError(f"tune: variant is {variant!r}; known: {', '.join(VARIANTS)}")
    only = {"norm": ("rope_store_kv_",), "write_k": ("rope_store_kv_",)}
    if shape is None or (variant == "fp8" and op == "rope_"):
        return None
    if op not in only.get(variant, (op,)):
        return None
    return Subject(op, heads, dtype, variant)


def arguments(subject: Subject, tokens: int, device: torch.device) -> dict[str, Any]:
    """Arguments of one call. Queries, keys and values are views of one packed projection, slots a
    random permutation, positions random."""
    shape = parse_heads(subject.heads)
    dtype = getattr(torch, subject.dtype)
    fp8 = subject.variant == "fp8"
    pool_dtype = torch.float8_e4m3fn if fp8 else dtype
    slots = max(2 * tokens, 64)
    mapping = torch.randperm(slots, device=device)[:tokens]
    rotation: dict[str, Any] = {}
    if subject.op.startswith("rope"):
        positions = torch.randint(0, MAX_POSITION, (tokens,), device=device)
        rotation = {"cos_sin_cache": table(shape, device), "positions": positions}
    call = _mla(shape, tokens, dtype, device) if shape.mla else _kv(shape, tokens, dtype, device)
    q = call.pop("q_rope" if shape.mla else "q")
    if rotation:
        call["q_rope" if shape.mla else "q"] = q
        if fp8:
            call["q_out"] = torch.empty(q.shape, dtype=pool_dtype, device=device)
    call |= rotation
    if subject.op == "rope_":
        del call["v"]
        return call
    call["slot_mapping"] = mapping
    if shape.mla:
        width = shape.latent_dim + shape.head_dim
        call["pool"] = zeros((slots, width), pool_dtype, device)
        return call | ({"scale": torch.ones(1, device=device)} if fp8 else {})
    pool = (slots, shape.heads_kv, shape.head_dim)
    call |= {f"{part}_pool": zeros(pool, pool_dtype, device) for part in "kv"}
    call["layout"] = "slots"
    if fp8:
        call |= {f"{part}_scale": torch.ones(1, device=device) for part in "kv"}
    if subject.variant == "norm":
        weight = torch.rand(shape.head_dim, device=device).to(dtype) + 0.5
        call |= {f"{part}_norm_weight": weight for part in "qk"}
    if subject.variant == "write_k":
        call["write_k"] = True
    return call


def zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A pool whose memory has been touched."""
    return torch.zeros(size, dtype=torch.bfloat16, device=device).to(dtype)


def table(shape: Workload, device: torch.device) -> Tensor:
    """The default cos/sin table, float32."""
    half = torch.arange(0, shape.rotary_dim, 2, device=device) / shape.rotary_dim
    angle = torch.arange(MAX_POSITION, device=device)[:, None] * 10000.0**-half
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def _kv(shape: Workload, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    counts = (shape.heads_q, shape.heads_kv, shape.heads_kv)
    sizes = [count * shape.head_dim for count in counts]
    packed = torch.randn(tokens, sum(sizes), device=device, dtype=torch.float32).to(dtype)
    parts = [part.unflatten(1, (-1, shape.head_dim)) for part in packed.split(sizes, dim=1)]
    return dict(zip("qkv", parts, strict=True))


def _mla(shape: Workload, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    return {
        "q_rope": normal(tokens, shape.heads_q, shape.head_dim),
        "k_nope": normal(tokens, shape.latent_dim),
        "k_rope": normal(tokens, shape.head_dim),
    }
