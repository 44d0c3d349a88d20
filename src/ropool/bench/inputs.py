"""The tensors that a workload runs on: realistic slots and positions, and so many sets of them that
a call does not find in a cache what the call before it left there."""

from __future__ import annotations

from dataclasses import dataclass

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
    """`[T, Hk, D]`, empty for `rope_`; MLA: the latent part, `[T, L]`."""
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
    """`[1]`, for fp8 pools."""

    q_heads_first: Tensor
    """`q` as `[1, Hq, T, D]`, the view that `transformers` works on. This and the following views
    are made once, since a model has them at hand anyway."""
    k_heads_first: Tensor
    k_slots: Tensor
    """`k_pool` as `[S, Hk, D]`, MLA `[S, W]`; fp8 as bytes, since not every device indexes fp8."""
    v_slots: Tensor


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
    scale = torch.full((1,), SCALE, device=device) if w.fp8 else None
    dtype = getattr(torch, w.dtype)
    k_shape = (w.tokens, w.head_dim) if w.mla else (w.tokens, w.heads_kv, w.head_dim)
    v_shape = (w.tokens, w.latent_dim) if w.mla else k_shape
    sets = []
    for _ in range(count):
        positions, slots = make_indices(w.tokens, table.shape[0], pages)
        positions, slots = positions.to(device), slots.to(device)
        cos, sin = table[positions].to(dtype).chunk(2, dim=-1)
        q = normal((w.tokens, w.heads_q, w.head_dim), dtype, device)
        k = normal(k_shape, dtype, device)
        sets.append(
            Inputs(
                q=q,
                k=k,
                v=normal((0,) if w.op == "rope_" else v_shape, dtype, device),
                positions=positions,
                slots=slots,
                table=table,
                cos=torch.cat((cos, cos), dim=-1).unsqueeze(0),
                sin=torch.cat((sin, sin), dim=-1).unsqueeze(0),
                k_pool=k_pool,
                v_pool=v_pool,
                scale=scale,
                q_heads_first=q.transpose(0, 1).unsqueeze(0),
                k_heads_first=k.unsqueeze(0).unsqueeze(0)
                if w.mla
                else k.transpose(0, 1).unsqueeze(0),
                k_slots=as_slots(k_pool),
                v_slots=as_slots(v_pool),
            )
        )
    return sets


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
    any position, any row of a page of its own. A prompt has positions `0..T-1` and fills pages
    that are scattered over the pool."""
    if tokens <= DECODE_TOKENS:
        page = torch.randperm(pages)[:tokens]
        return torch.randperm(max_position)[:tokens], page * PAGE + torch.randint(PAGE, (tokens,))
    page = torch.randperm(pages)[: -(-tokens // PAGE)]
    slots = (page[:, None] * PAGE + torch.arange(PAGE)).flatten()[:tokens]
    return torch.arange(tokens), slots
