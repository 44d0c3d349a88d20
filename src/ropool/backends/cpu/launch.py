"""Binds a call of each op to the C++ kernels: everything static goes into a native plan once, and a
launch takes nothing but addresses from its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ropool import _cpu
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args, Launch
from ropool.layouts import PlaneView, plane_view

Operand = tuple[int, str, int]
"""Index in the argument tuple, name in the plan, bytes added to the address."""

_DS_MLA_SCALES = 512
_DS_MLA_ROPE = 528


def rope_(key: Key, args: Args, options: Options) -> Launch:
    """Bind `rope_`."""
    q, k, table, positions, offsets = args
    call = _call(q)
    call.q = _rows(q)
    if k is not None:
        call.k = _rows(k)
        call.write_k = True
    call.rotary = _rotary(table, positions, offsets, options)
    return _launch(call, args, ("q", "k", "table", "positions", "offsets"))


def rope_store_kv_(key: Key, args: Args, options: Options) -> Launch:
    """Bind `rope_store_kv_`."""
    q, k, v, k_pool, v_pool, table, positions, slots, offsets, *rest = args
    q_norm, k_norm, k_scale, v_scale, q_out, q_scale, window = rest
    call = _call(q)
    call.q, call.k, call.v = _rows(q), _rows(k), _rows(v)
    call.rotary = _rotary(table, positions, offsets, options)
    _set_pools(call, k_pool, v_pool, options)
    _set_slots(call, slots, window, options)
    _set_q_out(call, q_out, q_scale)
    call.k_scale, call.v_scale = _scales(k_scale), _scales(v_scale)
    if q_norm is not None:
        call.set_q_norm(_dtype(q_norm))
    if k_norm is not None:
        call.set_k_norm(_dtype(k_norm))
    call.norm_eps = options.norm_eps
    call.write_k = options.write_k
    names = (
        *("q", "k", "v", "k_pool", "v_pool", "table", "positions", "slots", "offsets"),
        *("q_norm", "k_norm", "k_scale", "v_scale", "q_out", "q_scale", "window"),
    )
    return _launch(call, args, names)


def store_kv_(key: Key, args: Args, options: Options) -> Launch:
    """Bind `store_kv_`."""
    k, v, k_pool, v_pool, slots, k_scale, v_scale, window = args
    call = _call(k)
    call.k, call.v = _rows(k), _rows(v)
    _set_pools(call, k_pool, v_pool, options)
    _set_slots(call, slots, window, options)
    call.k_scale, call.v_scale = _scales(k_scale), _scales(v_scale)
    names = ("k", "v", "k_pool", "v_pool", "slots", "k_scale", "v_scale", "window")
    return _launch(call, args, names)


def store_mla_(key: Key, args: Args, options: Options) -> Launch:
    """Bind `store_mla_`."""
    k_nope, k_rope, pool, slots, scale, window = args
    call = _call(k_rope)
    extra = _set_mla(call, key, k_nope, k_rope, pool, scale, operand_at=(2, 4))
    _set_slots(call, slots, window, options)
    return _launch(call, args, ("v", "k", None, "slots", None, "window"), extra)


def rope_store_mla_(key: Key, args: Args, options: Options) -> Launch:
    """Bind `rope_store_mla_`."""
    q, k_nope, k_rope, pool, table, positions, slots, offsets, scale, q_out, q_scale, window = args
    call = _call(q)
    call.q = _rows(q)
    extra = _set_mla(call, key, k_nope, k_rope, pool, scale, operand_at=(3, 8))
    call.rotary = _rotary(table, positions, offsets, options)
    _set_slots(call, slots, window, options)
    _set_q_out(call, q_out, q_scale)
    call.write_k = options.write_k
    names = (
        *("q", "v", "k", None, "table", "positions", "slots", "offsets", None),
        *("q_out", "q_scale", "window"),
    )
    return _launch(call, args, names, extra)


def _launch(
    call: _cpu.Call, args: Args, names: Sequence[str | None], extra: Sequence[Operand] = ()
) -> Launch:
    operands = [(index, name, 0) for index, name in enumerate(names) if name is not None]
    # Nothing is read of an empty tensor, and it may have no address; every other must have one.
    given = [part for part in (*operands, *extra) if _has_elements(args[part[0]])]
    return _cpu.Launch(call, given, torch.get_num_threads)


def _has_elements(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() > 0


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _call(first: Tensor) -> _cpu.Call:
    call = _cpu.Call()
    call.tokens = first.shape[0]
    return call


def _rows(tensor: Tensor) -> _cpu.Rows:
    """`[T, heads, dim]`, or `[T, dim]` as one head."""
    size = tensor.element_size()
    heads, head_stride = (tensor.shape[1], tensor.stride(1)) if tensor.dim() == 3 else (1, 0)
    return _cpu.Rows(
        _dtype(tensor), heads, tensor.shape[-1], tensor.stride(0) * size, head_stride * size
    )


def _indices(tensor: Tensor) -> _cpu.Indices:
    """`[N]`, or `[3, N]` positions."""
    size = tensor.element_size()
    stream_stride = tensor.stride(0) * size if tensor.dim() == 2 else 0
    return _cpu.Indices(_dtype(tensor), tensor.shape[-1], tensor.stride(-1) * size, stream_stride)


def _scales(tensor: Tensor | None) -> _cpu.Scales:
    if tensor is None:
        return _cpu.Scales(False)
    per_head = tensor.dim() == 1 and tensor.shape[0] > 1
    return _cpu.Scales(True, tensor.stride(0) * 4 if per_head else 0)


def _rotary(
    table: Tensor, positions: Tensor, offsets: Tensor | None, options: Options
) -> _cpu.Rotary:
    return _cpu.Rotary(
        rotary_dim=table.shape[1],
        interleaved=options.interleaved,
        table_dtype=_dtype(table),
        max_position=table.shape[0],
        row_stride=table.stride(0) * table.element_size(),
        positions=_indices(positions),
        offsets=None if offsets is None else _indices(offsets),
        streams=_streams(table.shape[1] // 2, options),
    )


def _streams(half: int, options: Options) -> list[int]:
    """Which of the three position streams each frequency follows; empty for `[T]` positions."""
    section = options.mrope_section
    if section is None:
        return []
    if not options.mrope_interleaved:
        return [stream for stream in range(3) for _ in range(section[stream])]
    return [i % 3 if i < 3 * section[i % 3] else 0 for i in range(half)]


def _plane(view: PlaneView, dtype: str, size: int) -> _cpu.Plane:
    strides = (
        *(view.page_stride, view.head_stride, view.row_group_stride),
        *(view.row_stride, view.dim_group_stride, view.dim_stride),
    )
    return _cpu.Plane(
        dtype,
        view.pages,
        view.page_size,
        view.row_group,
        view.dim_group,
        *(stride * size for stride in strides),
    )


def _set_pools(call: _cpu.Call, k_pool: Tensor, v_pool: Tensor, options: Options) -> None:
    for part, pool in (("k", k_pool), ("v", v_pool)):
        view = plane_view(options.layout, part, pool.shape, pool.stride())
        if view.dim_group > 1:  # contiguous, but a size of 1 may come with any stride
            view = view._replace(dim_stride=1)
        plane = _plane(view, _dtype(pool), pool.element_size())
        setattr(call, f"{part}_pool", plane)


def _set_mla(
    call: _cpu.Call,
    key: Key,
    k_nope: Tensor,
    k_rope: Tensor,
    pool: Tensor,
    scale: Tensor | None,
    operand_at: tuple[int, int],
) -> list[Operand]:
    """Describe an MLA row as one K head (the rope part) and one V head (the latent part)."""
    call.k, call.v = _rows(k_rope), _rows(k_nope)
    size = pool.element_size()
    if pool.dim() == 2:
        pages, page_size, page_stride, row_stride = pool.shape[0], 1, pool.stride(0), 0
    else:
        pages, page_size, page_stride, row_stride = *pool.shape[:2], pool.stride(0), pool.stride(1)

    def plane(dtype: str, dims: int) -> _cpu.Plane:
        strides = (page_stride * size, 0, row_stride * size, 0, 0)
        itemsize = getattr(torch, dtype).itemsize
        return _cpu.Plane(dtype, pages, page_size, 1, dims, *strides, itemsize)

    latent = k_nope.shape[1]
    pool_at, scale_at = operand_at
    if key.row_format == "fp8_ds_mla":
        call.v_tiles = True
        call.tile_scales = _DS_MLA_SCALES
        call.k_pool = plane("bfloat16", k_rope.shape[1])
        call.v_pool = plane("float8_e4m3fn", latent)
        return [(pool_at, "v_pool", 0), (pool_at, "k_pool", _DS_MLA_ROPE)]
    call.k_pool = plane(_dtype(pool), k_rope.shape[1])
    call.v_pool = plane(_dtype(pool), latent)
    operands = [(pool_at, "v_pool", 0), (pool_at, "k_pool", latent * size)]
    if scale is not None:
        call.k_scale = call.v_scale = _scales(scale)
        operands += [(scale_at, "k_scale", 0), (scale_at, "v_scale", 0)]
    return operands


def _set_slots(call: _cpu.Call, slots: Tensor, window: Tensor | None, options: Options) -> None:
    call.slots = _indices(slots)
    if window is not None:
        call.window = _indices(window)
    if options.padding_slot is not None:
        call.padding_slot = options.padding_slot


def _set_q_out(call: _cpu.Call, q_out: Tensor | None, q_scale: Tensor | None) -> None:
    if q_out is not None:
        call.q_out = _rows(q_out)
        call.q_scale = _scales(q_scale)
