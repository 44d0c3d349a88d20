"""The five ops, token by token: which elements a call writes, and their exact values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from oracle.formats import (
    DIVIDE_STEPS,
    HALF_STEP,
    NORM_STEPS,
    ROTATE_STEPS,
    TINY,
    Array,
    decode,
)

FLT_MAX = float(np.finfo(np.float32).max)
TILE = 128


class Row(NamedTuple):
    """Exact values and how far float32 arithmetic may stray from them."""

    value: Array
    slack: Array


@dataclass
class Expected:
    """What a call does to argument `arg`; where `written` is false, nothing.

    `columns` limits it to those bytes of a byte row, read as `dtype`.
    """

    arg: str
    dtype: torch.dtype
    value: Array
    slack: Array
    written: np.ndarray[Any, np.dtype[np.bool_]]
    columns: slice | None = None

    @classmethod
    def untouched(cls, arg: str, tensor: torch.Tensor) -> Expected:
        shape = tuple(tensor.shape)
        return cls(
            arg, tensor.dtype, np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.bool_)
        )

    def put(self, index: tuple[Any, ...], row: Row) -> None:
        self.value[index] = row.value
        self.slack[index] = row.slack
        self.written[index] = True


def expected(op: str, args: Mapping[str, Any]) -> list[Expected]:
    """What op `op` must do when called with keyword arguments `args`; nothing is modified here."""
    with np.errstate(all="ignore"):
        return _OPS[op](args)


# --- integers: which token goes where -------------------------------------------------------------


def _target_slot(args: Mapping[str, Any], token: int, slots: int) -> int | None:
    """The pool slot that `token` is written to, or None when the pool stays as it is."""
    slot = int(args["slot_mapping"][token])
    if slot < 0 or slot == args.get("padding_slot"):
        return None
    window = args.get("window_slot_map")
    if window is not None:
        if slot >= len(window):
            return None
        slot = int(window[slot])
    return slot if 0 <= slot < slots else None


def _stream_of(frequency: int, section: tuple[int, int, int], interleaved: bool) -> int:
    """Which of the three positions (temporal, height, width) turns this frequency."""
    t, h, w = section
    if interleaved:
        if frequency % 3 == 1 and frequency < 3 * h:
            return 1
        if frequency % 3 == 2 and frequency < 3 * w:
            return 2
        return 0
    return 0 if frequency < t else 1 if frequency < t + h else 2


def _angles(args: Mapping[str, Any], token: int, table: Array) -> tuple[Array, Array] | None:
    """cos and sin `[R/2]` of a token, or None when it stands outside the table."""
    offset = 0 if args.get("offsets") is None else int(args["offsets"][token])
    streams = [int(position) + offset for position in args["positions"][..., token].reshape(-1)]
    if any(not 0 <= position < len(table) for position in streams):
        return None
    half = np.arange(table.shape[1] // 2)
    position = np.full(len(half), streams[0])
    if len(streams) == 3:
        section, interleaved = args["mrope_section"], args.get("mrope_interleaved", False)
        position = np.array([streams[_stream_of(i, section, interleaved)] for i in half])
    return table[position, half], table[position, len(half) + half]


# --- floats: heads of one token, `[heads, D]`, or a row `[D]` -------------------------------------


def _exact(value: Array) -> Row:
    return Row(value, np.zeros_like(value))


def _normed(row: Row, weight: Array | None, eps: float) -> Row:
    if weight is None:
        return row
    x = row.value
    value = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return Row(value, NORM_STEPS * HALF_STEP * np.abs(value))


def _rotated(row: Row, cos: Array, sin: Array, interleaved: bool) -> Row:
    """The first `R` dims turned in pairs, the others as they are."""
    half = np.arange(len(cos))
    first, second = (2 * half, 2 * half + 1) if interleaved else (half, half + len(cos))
    a, b = row.value[..., first], row.value[..., second]
    value, slack = row.value.copy(), row.slack.copy()
    value[..., first] = a * cos - b * sin
    value[..., second] = b * cos + a * sin
    for one, other in ((first, second), (second, first)):
        terms = np.abs(row.value[..., one] * cos) + np.abs(row.value[..., other] * sin)
        inherited = row.slack[..., one] * np.abs(cos) + row.slack[..., other] * np.abs(sin)
        slack[..., one] = inherited + ROTATE_STEPS * HALF_STEP * terms + TINY
    return Row(value, slack)


def _scaled(row: Row, scale: Array | None) -> Row:
    if scale is None:
        return row
    value = row.value / scale
    return Row(value, row.slack / scale + DIVIDE_STEPS * HALF_STEP * np.abs(value))


def _scale(scale: torch.Tensor | None) -> Array | None:
    """One for each head, `[heads, 1]`, or one for all, `[1, 1]`."""
    return None if scale is None else decode(scale).reshape(-1, 1)


def _weight(args: Mapping[str, Any], name: str) -> Array | None:
    weight = args.get(name)
    return None if weight is None else decode(weight)


# --- pools ----------------------------------------------------------------------------------------


def _slots_and_page(layout: str, k_pool: torch.Tensor) -> tuple[int, int]:
    """Slots of the pool and tokens a page holds."""
    if layout == "slots":
        return k_pool.shape[0], 1
    rows = {"NHD": 1, "HND": 2, "x_packed": 3, "shuffled": 3}[layout]
    return k_pool.shape[0] * k_pool.shape[rows], k_pool.shape[rows]


def _pool_index(
    layout: str, part: str, pool: torch.Tensor, slot: int, page_size: int, head: Any, dim: Any
) -> tuple[Any, ...]:
    """Where dim `dim` of head `head` of a slot stands in a pool tensor; both may be arrays."""
    page, row = slot // page_size, slot % page_size
    if layout == "slots":
        return slot, head, dim
    if layout == "NHD":
        return page, row, head, dim
    if layout == "HND":
        return page, head, row, dim
    x = pool.shape[-1]
    if part == "k":
        return page, head, dim // x, row, dim % x
    if layout == "x_packed":
        return page, head, dim, row
    return page, head, row // x, dim, row % x


def _store_heads(out: Expected, pool: torch.Tensor, place: tuple[Any, ...], rows: Row) -> None:
    heads, dims = np.ogrid[: rows.value.shape[0], : rows.value.shape[1]]
    layout, part, slot, page_size = place
    out.put(_pool_index(layout, part, pool, slot, page_size, heads, dims), rows)


# --- the ops --------------------------------------------------------------------------------------


def _rope(args: Mapping[str, Any]) -> list[Expected]:
    table = decode(args["cos_sin_cache"])
    results = []
    for name in ("q", "k"):
        tensor = args.get(name)
        if tensor is None:
            continue
        out, x = Expected.untouched(name, tensor), decode(tensor)
        for token in range(tensor.shape[0]):
            angles = _angles(args, token, table)
            if angles is None:
                continue
            rows = _rotated(_exact(x[token]), *angles, args.get("interleaved", False))
            _put_rotated(out, token, rows, table.shape[1])
        results.append(out)
    return results


def _put_rotated(out: Expected, token: int, rows: Row, width: int) -> None:
    """In place, the dims beyond `width` have nothing done to them: they keep their bits."""
    out.put((token, ..., slice(width)), Row(rows.value[..., :width], rows.slack[..., :width]))


def _rope_store_kv(args: Mapping[str, Any]) -> list[Expected]:
    q, k, v = decode(args["q"]), decode(args["k"]), decode(args["v"])
    table = decode(args["cos_sin_cache"])
    layout = str(args.get("layout", "NHD"))
    slots, page_size = _slots_and_page(layout, args["k_pool"])
    q_weight, k_weight = _weight(args, "q_norm_weight"), _weight(args, "k_norm_weight")
    eps, style = args.get("norm_eps", 1e-6), args.get("interleaved", False)

    k_pool = Expected.untouched("k_pool", args["k_pool"])
    v_pool = Expected.untouched("v_pool", args["v_pool"])
    to_q_out = args.get("q_out") is not None
    q_name = "q_out" if to_q_out else "q"
    q_written = Expected.untouched(q_name, args[q_name])
    k_written = Expected.untouched("k", args["k"])
    for token in range(len(k)):
        angles = _angles(args, token, table)
        if angles is None:
            continue
        queries = _rotated(_normed(_exact(q[token]), q_weight, eps), *angles, style)
        if to_q_out:
            q_written.put((token,), _scaled(queries, _scale(args.get("q_scale"))))
        else:
            _put_rotated(q_written, token, queries, _changed(q_weight, table, q))
        keys = _rotated(_normed(_exact(k[token]), k_weight, eps), *angles, style)
        if args.get("write_k", False):
            _put_rotated(k_written, token, keys, _changed(k_weight, table, k))
        slot = _target_slot(args, token, slots)
        if slot is not None:
            keys = _scaled(keys, _scale(args.get("k_scale")))
            values = _scaled(_exact(v[token]), _scale(args.get("v_scale")))
            _store_heads(k_pool, args["k_pool"], (layout, "k", slot, page_size), keys)
            _store_heads(v_pool, args["v_pool"], (layout, "v", slot, page_size), values)
    return [q_written, k_written, k_pool, v_pool]


def _changed(weight: Array | None, table: Array, x: Array) -> int:
    """How many leading dims of a head change: the norm reaches all, the rotation only `R`."""
    return int(table.shape[1] if weight is None else x.shape[-1])


def _store_kv(args: Mapping[str, Any]) -> list[Expected]:
    layout = str(args.get("layout", "NHD"))
    slots, page_size = _slots_and_page(layout, args["k_pool"])
    results = []
    for part in ("k", "v"):
        pool = args[f"{part}_pool"]
        out, x = Expected.untouched(f"{part}_pool", pool), decode(args[part])
        for token in range(len(x)):
            slot = _target_slot(args, token, slots)
            if slot is not None:
                rows = _scaled(_exact(x[token]), _scale(args.get(f"{part}_scale")))
                _store_heads(out, pool, (layout, part, slot, page_size), rows)
        results.append(out)
    return results


class _MlaPool:
    """The rows of an MLA pool in one of its three formats."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self.pool: torch.Tensor = args["pool"]
        self.scale = None if args.get("scale") is None else decode(args["scale"]).reshape(1)
        self.page_size = 1 if self.pool.dim() == 2 else self.pool.shape[1]
        self.slots = self.pool.shape[0] * self.page_size
        rows = tuple(self.pool.shape[:-1])
        self.parts = [Expected.untouched("pool", self.pool)]
        if self.pool.dtype is torch.uint8:
            self.parts = [
                Expected("pool", dtype, np.zeros(wide), np.zeros(wide), np.zeros(wide, bool), bytes)
                for dtype, wide, bytes in (
                    (torch.float8_e4m3fn, (*rows, 512), slice(0, 512)),
                    (torch.float32, (*rows, 4), slice(512, 528)),
                    (torch.bfloat16, (*rows, 64), slice(528, 656)),
                )
            ]

    def store(self, slot: int, latent: Row, rope: Row) -> None:
        index = (slot,) if self.pool.dim() == 2 else (slot // self.page_size, slot % self.page_size)
        if self.pool.dtype is torch.uint8:
            self._store_tiles(index, latent)
            self.parts[2].put(index, rope)
            return
        row = Row(*(np.concatenate(pair) for pair in zip(latent, rope, strict=True)))
        self.parts[0].put(index, _scaled(row, self.scale))

    def _store_tiles(self, index: tuple[int, ...], latent: Row) -> None:
        """A scale for each 128 latents, from their largest magnitude; NaN does not count."""
        for tile in range(4):
            dims = slice(tile * TILE, (tile + 1) * TILE)
            x = latent.value[dims]
            amax = np.max(np.abs(x), where=~np.isnan(x), initial=0.0)
            scale = max(min(amax, FLT_MAX) / 448.0, 2.0**-126)
            slack = 0.0 if scale == 2.0**-126 else 2 * HALF_STEP * scale
            self.parts[1].put((*index, tile), Row(np.array(scale), np.array(slack)))
            self.parts[0].put((*index, dims), _scaled(_exact(x), np.array(scale)))


def _store_mla(args: Mapping[str, Any]) -> list[Expected]:
    pool, latent, rope = _MlaPool(args), decode(args["k_nope"]), decode(args["k_rope"])
    for token in range(len(latent)):
        slot = _target_slot(args, token, pool.slots)
        if slot is not None:
            pool.store(slot, _exact(latent[token]), _exact(rope[token]))
    return pool.parts


def _rope_store_mla(args: Mapping[str, Any]) -> list[Expected]:
    pool, table = _MlaPool(args), decode(args["cos_sin_cache"])
    q, latent, rope = decode(args["q_rope"]), decode(args["k_nope"]), decode(args["k_rope"])
    q_name = "q_rope" if args.get("q_out") is None else "q_out"
    q_written = Expected.untouched(q_name, args[q_name])
    k_written = Expected.untouched("k_rope", args["k_rope"])
    style = args.get("interleaved", False)
    for token in range(len(latent)):
        angles = _angles(args, token, table)
        if angles is None:
            continue
        queries = _rotated(_exact(q[token]), *angles, style)
        q_written.put((token,), _scaled(queries, _scale(args.get("q_scale"))))
        turned = _rotated(_exact(rope[token]), *angles, style)
        if args.get("write_k", False):
            k_written.put((token,), turned)
        slot = _target_slot(args, token, pool.slots)
        if slot is not None:
            pool.store(slot, _exact(latent[token]), turned)
    return [q_written, k_written, *pool.parts]


_OPS: dict[str, Callable[[Mapping[str, Any]], list[Expected]]] = {
    "rope_": _rope,
    "rope_store_kv_": _rope_store_kv,
    "store_kv_": _store_kv,
    "store_mla_": _store_mla,
    "rope_store_mla_": _rope_store_mla,
}
