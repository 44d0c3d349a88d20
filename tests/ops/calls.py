"""Whole calls of the ops, built from a few plain fields, run and compared with the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import ropool
from ops.backend import Backend
from ops.memory import placed, random_strided, strided
from oracle import compare, expected

Args = dict[str, Any]
FP8 = ("float8_e4m3fn", "float8_e5m2")
FNUZ = ("float8_e4m3fnuz", "float8_e5m2fnuz")
"""The encodings of AMD's gfx942, which `WITHOUT_FNUZ` do not write."""
WITHOUT_FNUZ = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call in plain fields, which `arguments` turns into tensors.

    dtypes are names; `model` is `dtype` itself.
    """

    op: str = "rope_store_kv_"
    seed: int = 0
    dtype: str = "bfloat16"
    tokens: int = 6
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 64
    v_head_dim: int | None = None
    has_k: bool = True

    rotary_dim: int | None = None
    interleaved: bool = False
    table_dtype: str = "float32"
    table_pad: int = 0
    max_position: int = 37
    position_dtype: str = "int64"
    slot_dtype: str = "int64"
    offset_dtype: str | None = None
    mrope: str | None = None  # sectioned or interleaved
    q_norm: str | None = None
    k_norm: str | None = None

    layout: str = "NHD"
    pages: int = 4
    page_size: int = 4
    dim_group: int = 8
    pool_dtype: str = "model"
    k_scale: str | None = None  # one ([1]), tensor ([]) or head
    v_scale: str | None = None
    q_out: str | None = None
    q_scale: str | None = None
    write_k: bool = False
    padding_slot: int | None = None
    window: str | None = None

    latent_dim: int = 512
    row_format: str = "model"  # or fp8, fp8_ds_mla
    paged: bool = True

    strides: str = "dense"  # dense, packed, odd, heads_first, random
    pool_strides: str = "dense"  # dense, kv (one storage for K and V), odd, random
    mistakes: bool = False  # padding, slots and positions out of range among the tokens
    specials: bool = False  # NaN, infinities, zeros and large values among the numbers

    def __str__(self) -> str:
        changed = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(Case, name) and name != "op"
        ]
        return f"{self.op}-{'-'.join(changed)}"

    @property
    def pool_slots(self) -> int:
        """`S`, slots of the pool."""
        if self.layout == "slots" or ("mla" in self.op and not self.paged):
            return self.pages
        return self.pages * self.page_size


def check(case: Case, backend: Backend) -> None:
    """Build the call, run it and compare all memory it can reach with the oracle."""
    check_args(case.op, arguments(case), backend)


def check_stored(op: str, args: Args, backend: Backend) -> None:
    """`check_args` for a call that a backend may refuse, since it writes a FNUZ format."""
    dtypes = {str(value.dtype) for value in args.values() if isinstance(value, torch.Tensor)}
    if backend.name in WITHOUT_FNUZ and any(dtype.endswith("fnuz") for dtype in dtypes):
        with pytest.raises(ropool.NoKernelError, match="fnuz"):
            check_args(op, args, backend)
    else:
        check_args(op, args, backend)


def check_args(op: str, args: Args, backend: Backend) -> Args:
    """Run the op on a copy of `args` and compare with the oracle; returns the copy."""
    after = placed(args, backend.device)
    getattr(ropool, op)(**after, backend=backend.name)
    compare(args, after, expected(op, args))
    return after


def altered(case: Case, **changed: Any) -> Args:
    """The arguments of `case` with some replaced."""
    return {**arguments(case), **changed}


def arguments(case: Case) -> Args:
    """The public keyword arguments of the call, tensors in poisoned storages."""
    rng = np.random.default_rng(case.seed)
    if case.op == "rope_":
        q, k, _ = _heads(case, rng)
        return {"q": q, "k": k if case.has_k else None, **_rotation(case, rng)}
    if case.op in ("rope_store_kv_", "store_kv_"):
        q, k, v = _heads(case, rng)
        k_pool, v_pool = _kv_pools(case, rng)
        args = {"k": k, "v": v, "k_pool": k_pool, "v_pool": v_pool, "layout": case.layout}
        args |= _slots(case, rng)
        for part in ("k", "v"):
            args[f"{part}_scale"] = _scale(
                getattr(case, f"{part}_scale"), case.heads_kv, case.pool_dtype, rng
            )
        if case.op == "rope_store_kv_":
            args |= {"q": q, **_rotation(case, rng), **_q_out(case, q, rng)}
            args["write_k"] = case.write_k
            args["q_norm_weight"] = _weight(case, case.q_norm, rng)
            args["k_norm_weight"] = _weight(case, case.k_norm, rng)
            args["norm_eps"] = [1e-6, 1e-5, 0.1][case.seed % 3]
        return args
    return _mla_arguments(case, rng)


def _dtype(case: Case, name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, case.dtype if name == "model" else name)
    return dtype


def numbers(
    shape: tuple[int, ...], dtype: torch.dtype, rng: np.random.Generator, specials: bool
) -> torch.Tensor:
    """Values over several orders of magnitude, for a tensor of `dtype`."""
    values = rng.standard_normal(shape) * 2.0 ** rng.uniform(-4, 5, shape)
    if specials and values.size:
        # Magnitudes whose squares a float32 sum still holds, 65504 where the format ends there.
        huge = 65504.0 if dtype is torch.float16 else 1e15
        odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, huge, -huge, 447.0, 600.0, 1e-3, 1e-7]
        chosen = rng.random(shape) < 0.04
        values = np.where(chosen, rng.choice(odd, shape), values)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def laid_out(
    shape: tuple[int, ...], dtype: torch.dtype, how: str, rng: np.random.Generator
) -> torch.Tensor:
    """A poisoned view with the strides that `how` names."""
    if how == "random":
        return random_strided(shape, dtype, rng)
    if how == "odd":
        # No row starts at a multiple of a vector; strides of size-1 dimensions make no sense.
        pads = [5] + [3] * (len(shape) - 2) + [0] if len(shape) > 1 else [0]
        return strided(shape, dtype, rng, pads=pads, shift=1)
    if how == "heads_first" and len(shape) == 3:
        return strided(shape, dtype, rng, order=(1, 0, 2))
    return strided(shape, dtype, rng)


def _filled(view: torch.Tensor, rng: np.random.Generator, specials: bool = False) -> torch.Tensor:
    view.copy_(numbers(tuple(view.shape), view.dtype, rng, specials))
    return view


def _heads(case: Case, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _dtype(case, "model")
    v_dim = case.v_head_dim or case.head_dim
    widths = [(case.heads_q, case.head_dim), (case.heads_kv, case.head_dim), (case.heads_kv, v_dim)]
    if case.strides == "packed":
        # The rows of one QKV projection, with a gap after each that no vector width divides.
        total = sum(heads * dim for heads, dim in widths)
        row = strided((case.tokens, total), dtype, rng, pads=(1, 0), shift=1)
        pieces = row.split([heads * dim for heads, dim in widths], dim=1)
        views = [piece.unflatten(1, width) for piece, width in zip(pieces, widths, strict=True)]
    else:
        views = [laid_out((case.tokens, *width), dtype, case.strides, rng) for width in widths]
    q, k, v = (_filled(view, rng, case.specials) for view in views)
    return q, k, v


def _rotation(case: Case, rng: np.random.Generator) -> Args:
    """Table, positions and the options of the rotation."""
    width = case.rotary_dim or case.head_dim
    table = strided(
        (case.max_position, width), _dtype(case, case.table_dtype), rng, pads=(case.table_pad, 0)
    )
    angle = np.outer(np.arange(case.max_position), 10.0 ** -np.linspace(0, 3, width // 2))
    table.copy_(torch.from_numpy(np.concatenate([np.cos(angle), np.sin(angle)], axis=1)))

    rows = 1 if case.mrope is None else 3
    where = rng.integers(0, case.max_position, (rows, case.tokens))
    offsets = rng.integers(-9, 9, case.tokens)
    if case.offset_dtype is not None:
        where = where - offsets
    if case.mistakes and case.tokens:
        wrong = [-1, -2, case.max_position, case.max_position + 1, 2**31 - 1, -(2**31)]
        if case.position_dtype == "int64":
            wrong += [2**32 + 1, 2**40, -(2**32)]
        hit = rng.random((rows, case.tokens)) < 0.25 / rows
        where = np.where(hit, rng.choice(wrong, (rows, case.tokens)), where)
    positions = _ints(where if rows == 3 else where[0], case.position_dtype, case.strides, rng)
    args: Args = {"cos_sin_cache": table, "positions": positions, "interleaved": case.interleaved}
    if case.offset_dtype is not None:
        args["offsets"] = _ints(offsets, case.offset_dtype, case.strides, rng)
    if case.mrope is not None:
        half = width // 2
        height = int(rng.integers(0, half // 3 + 1))
        wide = int(rng.integers(0, half // 3 + 1))
        args["mrope_section"] = (half - height - wide, height, wide)
        args["mrope_interleaved"] = case.mrope == "interleaved"
    return args


def _ints(values: Any, dtype: str, how: str, rng: np.random.Generator) -> torch.Tensor:
    view = laid_out(np.shape(values), getattr(torch, dtype), how, rng)
    view.copy_(torch.from_numpy(np.array(values, dtype=np.int64)))
    return view


def _slots(case: Case, rng: np.random.Generator) -> Args:
    """A slot mapping without duplicates, and the window map that it goes through."""
    slots, tokens = case.pool_slots, case.tokens
    count = slots
    args: Args = {"padding_slot": case.padding_slot}
    if case.window is not None:
        # A map longer than the pool: several full slots have no window slot (-1) or a nonsense one.
        count = slots + 7
        entries = np.full(count, -1)
        entries[rng.permutation(count)[:slots]] = rng.permutation(slots)
        if case.mistakes:
            entries[entries == -1] = rng.choice([-1, -5, slots, slots + 3, 2**31 - 1], 7)
        args["window_slot_map"] = _ints(entries, case.window, case.strides, rng)
    if tokens > count:
        raise ValueError(f"{tokens} tokens do not fit {count} slots without duplicates")
    mapping = rng.permutation(count)[:tokens]
    if case.mistakes and tokens:
        wrong = [-1, -1, -7, count, count + 1, 2**31 - 1, -(2**31)]
        if case.padding_slot is not None:
            wrong += [case.padding_slot] * 3
        if case.slot_dtype == "int64":
            wrong += [2**32, 2**32 + 1, 2**40 + 2, -(2**32)]
        mapping = np.where(rng.random(tokens) < 0.3, rng.choice(wrong, tokens), mapping)
    args["slot_mapping"] = _ints(mapping, case.slot_dtype, case.strides, rng)
    return args


def _scale(
    kind: str | None, heads: int, stored: str | None, rng: np.random.Generator
) -> torch.Tensor | None:
    if kind is None or stored not in FP8 + FNUZ:
        return None
    shape = {"tensor": (), "one": (1,), "head": (heads,)}[kind]
    scale = strided(shape or (1,), torch.float32, rng)
    scale.copy_(torch.from_numpy(2.0 ** rng.uniform(-4, 3, shape or (1,))))
    return scale[0] if kind == "tensor" else scale


def _weight(case: Case, name: str | None, rng: np.random.Generator) -> torch.Tensor | None:
    if name is None:
        return None
    weight = strided((case.head_dim,), _dtype(case, name), rng, shift=1)
    weight.copy_(torch.from_numpy(1 + 0.3 * rng.standard_normal(case.head_dim)))
    return weight


def _q_out(case: Case, q: torch.Tensor, rng: np.random.Generator) -> Args:
    if case.q_out is None:
        return {}
    how = "odd" if case.strides == "packed" else case.strides
    view = laid_out(tuple(q.shape), _dtype(case, case.q_out), how, rng)
    return {"q_out": view, "q_scale": _scale(case.q_scale, q.shape[1], case.q_out, rng)}


def _kv_pools(case: Case, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _dtype(case, case.pool_dtype)
    p, b, h, d, x = case.pages, case.page_size, case.heads_kv, case.head_dim, case.dim_group
    e = case.v_head_dim or d
    k_shape, v_shape = {
        "NHD": ((p, b, h, d), (p, b, h, e)),
        "HND": ((p, h, b, d), (p, h, b, e)),
        "slots": ((p, h, d), (p, h, e)),
        "x_packed": ((p, h, d // x, b, x), (p, h, e, b)),
        "shuffled": ((p, h, d // x, b, x), (p, h, b // x, e, x)),
    }[case.layout]
    if case.pool_strides == "kv" and k_shape == v_shape:
        both = strided((p, 2, *k_shape[1:]), dtype, rng)
        return both[:, 0], both[:, 1]
    how = case.pool_strides
    return laid_out(k_shape, dtype, how, rng), laid_out(v_shape, dtype, how, rng)


def _mla_arguments(case: Case, rng: np.random.Generator) -> Args:
    """The MLA ops; `head_dim` is `R`, the width of the rope parts."""
    latent, rope, tokens = case.latent_dim, case.rotary_dim or case.head_dim, case.tokens
    dtype = _dtype(case, "model")
    if case.strides == "packed":
        # What DeepSeek's projections leave: Q heads of (nope, rope), a row of (latent, rope).
        q = strided((tokens, case.heads_q, 24 + rope), dtype, rng)[..., 24:]
        row = strided((tokens, latent + rope), dtype, rng, pads=(1, 0), shift=1)
        nope, k_rope = row[:, :latent], row[:, latent:]
    else:
        q = laid_out((tokens, case.heads_q, rope), dtype, case.strides, rng)
        nope = laid_out((tokens, latent), dtype, case.strides, rng)
        k_rope = laid_out((tokens, rope), dtype, case.strides, rng)
    for view in (q, nope, k_rope):
        _filled(view, rng, case.specials)
    if case.specials:
        _odd_tiles(nope, rng)

    outer = (case.pages, case.page_size) if case.paged else (case.pages,)
    pool_dtype = {"model": case.dtype, "fp8": case.pool_dtype, "fp8_ds_mla": "uint8"}[
        case.row_format
    ]
    width = 656 if case.row_format == "fp8_ds_mla" else latent + rope
    pool = laid_out((*outer, width), getattr(torch, pool_dtype), case.pool_strides, rng)
    args: Args = {"k_nope": nope, "k_rope": k_rope, "pool": pool, **_slots(case, rng)}
    if case.row_format == "fp8":
        args["scale"] = _scale(case.k_scale, 1, case.pool_dtype, rng)
    if case.op == "rope_store_mla_":
        rotation = _rotation(replace(case, head_dim=rope, rotary_dim=rope), rng)
        args |= {"q_rope": q, **rotation, **_q_out(case, q, rng), "write_k": case.write_k}
    return args


def _odd_tiles(nope: torch.Tensor, rng: np.random.Generator) -> None:
    """Among the 128-wide tiles: all zero, all NaN, with an infinity, tiny, one value large."""
    for token in range(nope.shape[0]):
        for start in range(0, nope.shape[1] - 127, 128):
            tile = nope[token, start : start + 128]
            match int(rng.integers(0, 7)):
                case 0:
                    tile.zero_()
                case 1:
                    tile.fill_(float("nan"))
                case 2:
                    tile[3] = float("-inf")
                case 3:
                    tile.mul_(0).nan_to_num_(0).add_(2.0**-24).mul_(2.0**-100)
                case 4:
                    tile[127] = 60000.0
