"""The kinds of pool: what a model keeps of a token decides the tensors it is kept in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ropool.engine.spec import KVRow, LatentRow, ModelSpec
from ropool.errors import RopoolError
from ropool.kvcache import MHAPool, MLAFormat, MLAPool
from ropool.kvcache.mha import FP8_DTYPES
from ropool.kvcache.mla import DS_MLA_BYTES, DS_MLA_DIMS

CacheDtype = torch.dtype | MLAFormat
"""What a pool stores: the model's dtype, an fp8 dtype, or `MLAFormat.FP8_DS_MLA`."""
Pool = MHAPool | MLAPool


class LayerCache(NamedTuple):
    """The K and V tensors of one layer, as `rope_store_kv_` takes them."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    window_slot_map: Tensor | None


class LatentCache(NamedTuple):
    """The latent rows of one layer, as `rope_store_mla_` takes them."""

    rows: Tensor
    scale: Tensor | None
    window_slot_map: Tensor | None


def pool_dtype(spec: ModelSpec, asked: CacheDtype | None) -> CacheDtype:
    """What the pool of a model stores: `asked`, by default the model's dtype.

    Raises `RopoolError` for what no op writes.
    """
    allowed: tuple[CacheDtype, ...] = (spec.dtype, *FP8_DTYPES)
    if spec.row == LatentRow(*DS_MLA_DIMS):
        allowed += (MLAFormat.FP8_DS_MLA,)
    if asked is None:
        return spec.dtype
    if asked not in allowed:
        raise RopoolError(f"cache_dtype is {asked}; allowed: {', '.join(map(str, allowed))}")
    return allowed[allowed.index(asked)]


def row_bytes(row: KVRow | LatentRow, dtype: CacheDtype) -> int:
    """Bytes that a token takes in the pool of one layer."""
    if isinstance(dtype, MLAFormat):
        return DS_MLA_BYTES
    if isinstance(row, LatentRow):
        return (row.latent_dim + row.rope_dim) * dtype.itemsize
    return 2 * row.heads * row.head_dim * dtype.itemsize


def new_pool(
    spec: ModelSpec, dtype: CacheDtype, *, layers: int, pages: int, page_size: int
) -> Pool:
    """A zeroed pool for `layers` layers of the model; one of fp8 has scales, 1 to begin with."""
    row = spec.row
    fp8 = dtype in FP8_DTYPES
    if isinstance(row, KVRow):
        assert isinstance(dtype, torch.dtype)
        k_scales, v_scales = torch.ones(2, layers, row.heads) if fp8 else (None, None)
        return MHAPool(
            layers=layers,
            pages=pages,
            page_size=page_size,
            heads=row.heads,
            head_dim=row.head_dim,
            dtype=dtype,
            device=spec.device,
            k_scales=k_scales,
            v_scales=v_scales,
        )
    row_format = MLAFormat.MODEL
    if isinstance(dtype, MLAFormat):
        row_format, dtype = dtype, torch.uint8
    elif fp8:
        row_format = MLAFormat.FP8
    return MLAPool(
        layers=layers,
        pages=pages,
        page_size=page_size,
        latent_dim=row.latent_dim,
        rope_dim=row.rope_dim,
        dtype=dtype,
        row_format=row_format,
        device=spec.device,
        scales=torch.ones(layers) if row_format is MLAFormat.FP8 else None,
    )


def gather_buffers(spec: ModelSpec, pages: int, page_size: int) -> tuple[Tensor, ...]:
    """Memory for `pages` pages of one layer in the model's dtype: K and V `[pages, B, Hk, D]`, or
    the latent rows `[pages, B, L + R]`."""
    row = spec.row
    shapes: list[tuple[int, ...]]
    if isinstance(row, LatentRow):
        shapes = [(pages, page_size, row.latent_dim + row.rope_dim)]
    else:
        shapes = [(pages, page_size, row.heads, row.head_dim)] * 2
    return tuple(torch.empty(shape, dtype=spec.dtype, device=spec.device) for shape in shapes)
