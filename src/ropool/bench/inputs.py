"""The tensors that a workload runs on: realistic slots and positions, and so many sets of them that
a call does not find in a cache what the call before it left there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ropool.bench.traffic import DS_MLA_ROW, min_bytes
from ropool.bench.workload import Workload

PAGE = 16
DECODE_TOKENS = 256
"""Calls of up to so many tokens are decode batches, larger ones the prefill of a prompt."""
MIN_SLOTS = 16384
MAX_POSITION = 8192
SCALE = 0.02
"""fp8 scale under which normally distributed values use the range and do not saturate."""
NORM_EPS = 1e-6

ROTATE_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
MAX_SETS = {"cpu": 512, "cuda": 256}


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments of one call. Sets of one workload share the pool, the table and the scale."""

    q: Tensor
    """`[T, Hq, D]`, empty for a store."""
    k: Tensor
    """`[T, Hk, D]`; MLA: the rope part, `[T, R]`."""
    v: Tensor
    """`[T, Hk, D]`, unused by `rope_`; MLA: the latent part, `[T, L]`."""
    positions: Tensor
    slots: Tensor
    table: Tensor
    cos: Tensor
    """`[1, T, R]` in the model dtype, as `transformers` hands it to every layer."""
    sin: Tensor
    k_pool: Tensor
    """`[P, 16, Hk, D]`; MLA: the pool, `[P, 16, W]`; empty for `rope_`."""
    v_pool: Tensor
    """`[P, 16, Hk, D]`; empty for `rope_` and MLA."""
    scale: Tensor | None
    """`[1]`, for fp8 pools and an fp8 query."""
    q_norm: Tensor
    """`[D]` in the model dtype: weights of the query heads' RMSNorm; empty without one."""
    k_norm: Tensor
    q_out: Tensor
    """`[T, Hq, D]` fp8: where the rotated query goes; empty where it is rotated in place."""
    packed: Tensor
    """`[T, (Hq + 2 Hk) D]` on a GPU: the projection that `q`, `k` and `v` are views of, as in a
    model server; else, and for MLA, empty."""

    q_heads_first: Tensor
    """`q` as `[1, Hq, T, D]`, the view that `transformers` works on. This and the following views
    are made once, since a model has them at hand anyway."""
    k_heads_first: Tensor
    k_slots: Tensor
    """`k_pool` as `[S, Hk, D]`, MLA `[S, W]`; fp8 as bytes, since not every device indexes fp8."""
    v_slots: Tensor
    extra: dict[str, Any] = field(default_factory=dict)
    """What a provider made of the set beforehand, by the provider's name."""


def make_sets(workload: Workload, device: torch.device, seed: int = 0) -> list[Inputs]:
    """The sets that the timed calls go through in turn: together `ROTATE_BYTES`, at least 2 and at
    most `MAX_SETS`."""
    w = workload
    torch.manual_seed(seed)
    wanted = -(-ROTATE_BYTES[device.type] // min_bytes(w))
    count = max(2, min(MAX_SETS[device.type], wanted))
    pages = -(-max(MIN_SLOTS, 2 * count * w.tokens) // PAGE)
    k_pool, v_pool = make_pools(w, pages, device)
    table = make_table(max(MAX_POSITION, w.tokens), w.rotary_dim, device)
    dtype = getattr(torch, w.dtype)
    empty = torch.empty(0, dtype=dtype, device=device)
    q_shape = (w.tokens, w.heads_q, w.head_dim)
    norms = [normal((w.head_dim,), dtype, device) for _ in range(2)] if w.norm else [empty] * 2
    q_out_dtype = getattr(torch, w.q_dtype) if w.q_dtype else dtype
    sets = []
    for _ in range(count):
        positions, slots = make_indices(w.tokens, table.shape[0], pages)
        positions, slots = positions.to(device), slots.to(device)
        cos, sin = table[positions].to(dtype).chunk(2, dim=-1)
        packed = empty
        if w.mla:
            q = normal(q_shape, dtype, device)
            k = normal((w.tokens, w.head_dim), dtype, device)
            v = normal((w.tokens, w.latent_dim), dtype, device)
        else:
            heads = w.heads_q + 2 * w.heads_kv
            projection = normal((w.tokens, heads * w.head_dim), dtype, device)
            q, k, v = heads_in(projection, w.heads_q, w.heads_kv)
            if device.type == "cpu":
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            else:
                packed = projection
        sets.append(
            Inputs(
                q=q,
                k=k,
                v=v,
                positions=positions,
                slots=slots,
                table=table,
                cos=torch.cat((cos, cos), dim=-1).unsqueeze(0),
                sin=torch.cat((sin, sin), dim=-1).unsqueeze(0),
                k_pool=k_pool,
                v_pool=v_pool,
                scale=torch.full((1,), SCALE, device=device) if w.fp8 or w.q_dtype else None,
                q_norm=norms[0],
                k_norm=norms[1],
                q_out=torch.zeros(q_shape if w.q_dtype else 0, dtype=q_out_dtype, device=device),
                packed=packed,
                q_heads_first=heads_first(q),
                k_heads_first=heads_first(k),
                k_slots=as_slots(k_pool),
                v_slots=as_slots(v_pool),
            )
        )
    return sets


def heads_in(packed: Tensor, heads_q: int, heads_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value heads, `[T, H, D]` each, as views of a packed projection."""
    heads = packed.unflatten(1, (heads_q + 2 * heads_kv, -1))
    q, k, v = heads.split((heads_q, heads_kv, heads_kv), dim=1)
    return q, k, v


def heads_first(x: Tensor) -> Tensor:
    """`[T, H, D]` as `[1, H, T, D]`; `[T, R]` as one head."""
    return x[None, None] if x.dim() == 2 else x.transpose(0, 1).unsqueeze(0)


def copied(x: Inputs) -> Inputs:
    """`x` with queries and keys of its own."""
    if x.packed.numel():
        packed = x.packed.clone()
        q, k, v = heads_in(packed, x.q.shape[1], x.k.shape[1])
        x = replace(x, packed=packed, v=v)
    else:
        q, k = x.q.clone(), x.k.clone()
    q_out = x.q_out.clone()
    return replace(
        x, q=q, k=k, q_out=q_out, q_heads_first=heads_first(q), k_heads_first=heads_first(k)
    )


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values; zeros would hide wrong indexing and can run faster than real data."""
    return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)


def make_pools(w: Workload, pages: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A pool at least twice as large as all sets together, its memory touched once."""
    empty = torch.empty(0, device=device)
    if w.op == "rope_":
        return empty, empty
    if not w.mla:
        shape = (pages, PAGE, w.heads_kv, w.head_dim)
        dtype = getattr(torch, w.kv_dtype)
        return (
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
    if w.kv_dtype == "fp8_ds_mla":
        return torch.zeros((pages, PAGE, DS_MLA_ROW), dtype=torch.uint8, device=device), empty
    row = w.latent_dim + w.head_dim
    pool = torch.zeros((pages, PAGE, row), dtype=getattr(torch, w.kv_dtype), device=device)
    return pool, empty


def as_slots(pool: Tensor) -> Tensor:
    """The pool with pages and rows as one dimension; fp8 as bytes."""
    if pool.dim() < 3:
        return pool
    slots = pool.flatten(0, 1)
    return slots.view(torch.uint8) if slots.dtype.itemsize == 1 else slots


def make_table(rows: int, rotary_dim: int, device: torch.device) -> Tensor:
    """The default cos/sin table, `[rows, R]` float32."""
    frequency = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * 10000.0**-frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float().to(device)


def make_indices(tokens: int, max_position: int, pages: int) -> tuple[Tensor, Tensor]:
    """Positions and slots, int64. In a decode batch each token belongs to a sequence of its own:
    any position, and the row of a page of its own that goes with it. A prompt has positions
    `0..T-1` and fills pages that are scattered over the pool."""
    if tokens <= DECODE_TOKENS:
        page, positions = torch.randperm(pages)[:tokens], torch.randperm(max_position)[:tokens]
        return positions, page * PAGE + positions % PAGE
    page = torch.randperm(pages)[: -(-tokens // PAGE)]
    slots = (page[:, None] * PAGE + torch.arange(PAGE)).flatten()[:tokens]
    return torch.arange(tokens), slots
