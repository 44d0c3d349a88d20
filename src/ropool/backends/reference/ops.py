"""The five ops' definitions. Signatures are those of the public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ropool.backends.reference.rotate import gather_cos_sin, normalise, rotate, token_positions
from ropool.backends.reference.store import (
    bits,
    to_storage,
    writable_slots,
    write_mla_rows,
    write_plane,
)
from ropool.layouts import KVLayout, plane_view


def rope_(
    q: Tensor,
    k: Tensor | None,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    offsets: Tensor | None = None,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    backend: str | None = None,
) -> None:
    """See `ropool.rope_`."""
    where, tokens = token_positions(positions, offsets, cos_sin_cache.shape[0])
    section = None if mrope_section is None else tuple(mrope_section)
    cos, sin = gather_cos_sin(cos_sin_cache, where[..., tokens], section, mrope_interleaved)
    for heads in (q, k):
        if heads is not None:
            rotated = rotate(heads[tokens].float(), cos, sin, interleaved)
            _write_back(heads, tokens, rotated, cos_sin_cache.shape[1])


def rope_store_kv_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    layout: KVLayout | str = KVLayout.NHD,
    interleaved: bool = False,
    offsets: Tensor | None = None,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_out: Tensor | None = None,
    q_scale: Tensor | None = None,
    write_k: bool = False,
    window_slot_map: Tensor | None = None,
    padding_slot: int | None = None,
    backend: str | None = None,
) -> None:
    """See `ropool.rope_store_kv_`."""
    where, tokens = token_positions(positions, offsets, cos_sin_cache.shape[0])
    section = None if mrope_section is None else tuple(mrope_section)
    cos, sin = gather_cos_sin(cos_sin_cache, where[..., tokens], section, mrope_interleaved)
    query = rotate(normalise(q[tokens].float(), q_norm_weight, norm_eps), cos, sin, interleaved)
    key = rotate(normalise(k[tokens].float(), k_norm_weight, norm_eps), cos, sin, interleaved)
    rotary_dim = cos_sin_cache.shape[1]
    q_changed = rotary_dim if q_norm_weight is None else q.shape[2]
    k_changed = rotary_dim if k_norm_weight is None else k.shape[2]
    _store_kv(
        _rounded(key, k[tokens], k_changed, k_pool.dtype), v[tokens], k_pool, v_pool,
        slot_mapping[tokens], KVLayout(layout), k_scale, v_scale, window_slot_map, padding_slot,
    )  # fmt: skip
    if q_out is None:
        _write_back(q, tokens, query, q_changed)
    else:
        query = _rounded(query, q[tokens], q_changed, q_out.dtype)
        _write_query(q_out, q_scale, tokens, query)
    if write_k:
        _write_back(k, tokens, key, k_changed)


def store_kv_(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    *,
    layout: KVLayout | str = KVLayout.NHD,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window_slot_map: Tensor | None = None,
    padding_slot: int | None = None,
    backend: str | None = None,
) -> None:
    """See `ropool.store_kv_`."""
    _store_kv(
        k, v, k_pool, v_pool, slot_mapping,
        KVLayout(layout), k_scale, v_scale, window_slot_map, padding_slot,
    )  # fmt: skip


def store_mla_(
    k_nope: Tensor,
    k_rope: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    *,
    scale: Tensor | None = None,
    window_slot_map: Tensor | None = None,
    padding_slot: int | None = None,
    backend: str | None = None,
) -> None:
    """See `ropool.store_mla_`."""
    slots = pool.shape[:-1].numel()
    written, slot = writable_slots(slot_mapping, slots, window_slot_map, padding_slot)
    write_mla_rows(pool, slot[written], k_nope[written], k_rope[written], scale)


def rope_store_mla_(
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    pool: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    offsets: Tensor | None = None,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    scale: Tensor | None = None,
    q_out: Tensor | None = None,
    q_scale: Tensor | None = None,
    write_k: bool = False,
    window_slot_map: Tensor | None = None,
    padding_slot: int | None = None,
    backend: str | None = None,
) -> None:
    """See `ropool.rope_store_mla_`."""
    where, tokens = token_positions(positions, offsets, cos_sin_cache.shape[0])
    section = None if mrope_section is None else tuple(mrope_section)
    cos, sin = gather_cos_sin(cos_sin_cache, where[..., tokens], section, mrope_interleaved)
    query = rotate(q_rope[tokens].float(), cos, sin, interleaved)
    key = rotate(k_rope[tokens].float().unsqueeze(1), cos, sin, interleaved).squeeze(1)
    slots = pool.shape[:-1].numel()
    written, slot = writable_slots(slot_mapping[tokens], slots, window_slot_map, padding_slot)
    row = _rounded(key, k_rope[tokens], k_rope.shape[1], pool.dtype)
    write_mla_rows(pool, slot[written], k_nope[tokens][written], row[written], scale)
    if q_out is None:
        _write_back(q_rope, tokens, query, q_rope.shape[2])
    else:
        _write_query(q_out, q_scale, tokens, query)
    if write_k:
        _write_back(k_rope, tokens, key, k_rope.shape[1])


def _store_kv(
    key: Tensor,
    value: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_mapping: Tensor,
    layout: KVLayout,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    window_slot_map: Tensor | None,
    padding_slot: int | None,
) -> None:
    """Write heads `[n, Hk, D]`, in the pool's dtype or not yet rounded, to their slots."""
    view = plane_view(layout, "k", k_pool.shape, k_pool.stride())
    slots = view.pages * view.page_size
    written, slot = writable_slots(slot_mapping, slots, window_slot_map, padding_slot)
    planes = (("k", k_pool, key, k_scale), ("v", v_pool, value, v_scale))
    for part, pool, heads, scale in planes:
        write_plane(
            pool, part, layout, slot[written], to_storage(heads[written], pool.dtype, scale)
        )


def _rounded(values: Tensor, heads: Tensor, changed: int, dtype: torch.dtype) -> Tensor:
    """float32 `values` of `heads` as they are stored in `dtype`: in that of `heads`, where only the
    first `changed` dims are rounded and the others keep their bits, those of a NaN too."""
    if dtype != heads.dtype:
        return values
    return torch.cat((values[..., :changed].to(dtype), heads[..., changed:]), dim=-1)


def _write_query(q_out: Tensor, q_scale: Tensor | None, tokens: Tensor, query: Tensor) -> None:
    """Write queries `[n, Hq, D]` to their tokens of `q_out`."""
    bits(q_out)[tokens] = bits(to_storage(query, q_out.dtype, q_scale))


def _write_back(heads: Tensor, tokens: Tensor, values: Tensor, changed: int) -> None:
    """Write the first `changed` dims of float32 `values` over those of their tokens. The others
    keep their bytes, which a conversion to float32 and back would not leave a NaN."""
    heads[tokens, ..., :changed] = values[..., :changed].to(heads.dtype)
