"""Slots, rounding to the storage dtype, and the writes into each layout and row format."""

from __future__ import annotations

import torch
from torch import Tensor

from ropool.layouts import KVLayout

FP8_MAX = {dtype: torch.finfo(dtype).max for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)} | {
    dtype: torch.finfo(dtype).max for dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
}
LATENT_TILE = 128
"""Latents that share a scale in the 656-byte row."""


def writable_slots(
    slot_mapping: Tensor, slots: int, window_slot_map: Tensor | None, padding_slot: int | None
) -> tuple[Tensor, Tensor]:
    """Whether each token is written, and the slot of the pool that it goes to (0 where it is not
    written)."""
    slot = slot_mapping.long()
    written = slot >= 0
    if padding_slot is not None:
        written &= slot != padding_slot
    if window_slot_map is not None:
        written &= slot < window_slot_map.shape[0]
        if window_slot_map.shape[0] == 0:
            return written, torch.zeros_like(slot)
        slot = window_slot_map.long()[slot.where(written, 0)]
        written &= slot >= 0
    written &= slot < slots
    return written, slot.where(written, 0)


def to_storage(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Round heads `[n, H, D]` once. fp8 is divided by the scale and saturated, NaN stays NaN; the
    clamp is explicit because PyTorch's own cast has not always saturated."""
    if dtype not in FP8_MAX:
        return x.to(dtype)
    x = x.float()
    if scale is not None:
        x = x / scale.reshape(-1, 1)
    return x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)


def bits(x: Tensor) -> Tensor:
    """fp8 as bytes, since PyTorch does not index fp8 tensors on every device."""
    return x.view(torch.uint8) if x.dtype in FP8_MAX else x


def write_plane(pool: Tensor, part: str, layout: KVLayout, slots: Tensor, heads: Tensor) -> None:
    """Write heads `[n, Hk, D]`, in the pool's dtype, to distinct slots of one pool tensor."""
    pool, heads = bits(pool), bits(heads)
    if layout is KVLayout.SLOTS:
        pool[slots] = heads
        return
    if layout is KVLayout.NHD:
        page_size = pool.shape[1]
    elif layout is KVLayout.HND:
        page_size = pool.shape[2]
    elif part == "k" or layout is KVLayout.X_PACKED:
        page_size = pool.shape[3]
    else:
        page_size = pool.shape[2] * pool.shape[4]
    page, row = slots // page_size, slots % page_size
    if layout is KVLayout.NHD:
        pool[page, row] = heads
    elif layout is KVLayout.HND:
        pool[page, :, row] = heads
    elif part == "k":
        pool[page, :, :, row] = heads.unflatten(-1, (pool.shape[2], pool.shape[4]))
    elif layout is KVLayout.X_PACKED:
        pool[page, :, :, row] = heads
    else:
        group = pool.shape[4]
        pool[page, :, row // group, :, row % group] = heads


def write_mla_rows(
    pool: Tensor, slots: Tensor, latent: Tensor, rope: Tensor, scale: Tensor | None
) -> None:
    """Write parts `[n, L]` and `[n, R]` to distinct slots as rows of the pool's format."""
    if pool.dtype == torch.uint8:
        rows = packed_rows(latent.float(), rope)
    else:
        rows = bits(to_storage(torch.cat((latent, rope), dim=-1), pool.dtype, scale))
    pool = bits(pool)
    if pool.dim() == 2:
        pool[slots] = rows
    else:
        pool[slots // pool.shape[1], slots % pool.shape[1]] = rows


def packed_rows(latent: Tensor, rope: Tensor) -> Tensor:
    """`[n, 656]` bytes: 512 float8_e4m3fn latents, a float32 scale for each 128 of them, 64
    bfloat16 rope values.

    A scale is the largest magnitude of its tile / 448, kept normal so that a tile of zeros stays
    zero, and finite so that an infinite latent saturates.
    """
    tiles = latent.unflatten(-1, (-1, LATENT_TILE))
    largest = tiles.abs().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max).amax(dim=-1)
    # By a tensor: PyTorch multiplies by the inverse of a number on a GPU, which rounds otherwise.
    scales = largest / torch.full_like(largest, FP8_MAX[torch.float8_e4m3fn])
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    quantised = to_storage(tiles / scales.unsqueeze(-1), torch.float8_e4m3fn, None).flatten(-2)
    parts = (quantised, scales, rope.to(torch.bfloat16))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
