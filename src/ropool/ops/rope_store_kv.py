"""`rope_store_kv_`: rotate query and key heads and write keys and values into a paged KV pool."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.layouts import KVLayout
from ropool.ops._check import check_positions, check_slots
from ropool.ops._eager import eager
from ropool.ops._op import OVERLOADS, Op, hashable, overload_of
from ropool.ops._validate import Checker, dtype_name, optional_dtype, pool_slots, scale_kind

_SCHEMA = """(Tensor{q} q, Tensor{k} k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor
cos_sin_cache,
    Tensor positions, Tensor slot_mapping, Tensor? offsets, Tensor? q_norm_weight, Tensor?
    k_norm_weight, Tensor? k_scale,
    Tensor? v_scale, Tensor{q_out}? q_out, Tensor? q_scale, Tensor? window_slot_map, str layout,
    bool interleaved,
    int[]? mrope_section, bool mrope_interleaved, float norm_eps, bool write_k, int? padding_slot,
    str? backend) -> ()"""


@eager
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
    """Rotates `q` in place and writes the rotated `k`, and `v`, into the pool, in one pass over
    memory.

    For each token: optional RMSNorm of the query and key heads (QK-norm), rotation of their first
    `R` dims (arXiv:2104.09864), then the writes. Arithmetic is float32 with one rounding at the
    store. `k` itself is not modified unless `write_k`; `q` is not modified when `q_out` is given.

    A token whose slot is negative or `padding_slot` is padding: its query is rotated, the pool is
    not touched. A token whose slot is past the pool is treated alike; one whose position is outside
    the cache is skipped altogether. Slots must be distinct: of two tokens with one slot, either may
    win.

    Args:
        q: `[T, Hq, D]`, float16, bfloat16 or float32; any strides, last dimension contiguous.
            Modified in place, unless `q_out` is given.
        k: `[T, Hk, D]`, dtype of `q`; `Hq` is a multiple of `Hk`.
        v: `[T, Hk, Dv]`, dtype of `q`.
        k_pool, v_pool: the pool, in `layout`; dtype of `q`, or fp8 (float8_e4m3fn, float8_e5m2).
            May be strided views. Modified in place.
        cos_sin_cache: `[max_position, R]`, the first half cos, the second half sin; float32 or the
            dtype of `q`.
        positions: `[T]`, or `[3, T]` (temporal, height, width) with `mrope_section`; int32 or
            int64.
        slot_mapping: `[T]`, int32 or int64: the slot that each token's K and V go to. Slot `s` is
            page `s // B`, row `s % B`.
        layout: how the pool is arranged, see `ropool.KVLayout`.
        interleaved: pairs are `(2i, 2i+1)` instead of `(i, i + R/2)` (neox).
        offsets: `[T]`, int32 or int64, added to the positions.
        mrope_section: sizes that add up to `R / 2`: how many frequencies follow the temporal,
            height and width position (M-RoPE, arXiv:2409.12191).
        mrope_interleaved: the three kinds of frequencies alternate (`thwthw...t`) instead of
            standing in sections.
        q_norm_weight, k_norm_weight: `[D]`, float32 or the dtype of `q`: RMSNorm weights applied to
            each head before the rotation (arXiv:1910.07467); each may be given alone. Models that
            scale by `1 + weight` pass that sum.
        norm_eps: added to the mean square of a head.
        k_scale, v_scale: `[]`, `[1]` or `[Hk]`, float32, for an fp8 pool: the stored value is `x /
            scale`, saturated to the largest finite value; NaN stays NaN. Without one the scale is
            1.
        q_out: `[T, Hq, D]`, dtype of `q` or fp8: the rotated query goes here and `q` is not
            modified.
        q_scale: `[]`, `[1]` or `[Hq]`, float32, for an fp8 `q_out`, as `k_scale`.
        write_k: also write the rotated key back into `k`.
        window_slot_map: `[N]`, int32 or int64, for sliding-window pools: maps a slot of
            `slot_mapping` to the slot of this pool, looked up after the padding test; a negative
            entry is padding.
        padding_slot: a slot of `slot_mapping` that means padding, beside the negative ones.
        backend: run on this backend or raise; by default the best that can.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written.
        IndexError: with `ROPOOL_CHECK=1`, a slot or position is out of range; nothing has been
            written.
    """
    args = (
        q,
        k,
        v,
        k_pool,
        v_pool,
        cos_sin_cache,
        positions,
        slot_mapping,
        offsets,
        q_norm_weight,
        k_norm_weight,
        k_scale,
        v_scale,
        q_out,
        q_scale,
        window_slot_map,
    )
    options = (
        layout,
        interleaved,
        hashable(mrope_section),
        mrope_interleaved,
        norm_eps,
        write_k,
        padding_slot,
    )
    OP(args, options, backend, overload_of(write_k, q_out))


def _key(args: Args, options: Options) -> Key:
    q, k, v, k_pool, v_pool, cos_sin_cache, positions, slot_mapping, *optional = args
    offsets, q_norm_weight, k_norm_weight, k_scale, v_scale, q_out, q_scale, window_slot_map = (
        optional
    )
    checker = Checker("rope_store_kv_")
    model = checker.model_dtype("q", q)
    checker.tensor("q", q, ("T", "Hq", "D"), model, written=q_out is None)
    checker.tensor("k", k, ("T", "Hk", "D"), model, written=options.write_k)
    checker.tensor("v", v, ("T", "Hk", "Dv"), model)
    checker.grouped()
    k_view, v_view = checker.kv_pool(options.layout, k_pool, v_pool, model)
    checker.rotary(options, cos_sin_cache, positions, offsets, model, q.shape[2], "q")
    checker.slots(options, slot_mapping, window_slot_map)
    checker.norm("q_norm_weight", q_norm_weight, model)
    checker.norm("k_norm_weight", k_norm_weight, model)
    checker.norm_eps(options.norm_eps)
    checker.scale("k_scale", k_scale, "Hk", "k_pool", k_pool.dtype)
    checker.scale("v_scale", v_scale, "Hk", "v_pool", v_pool.dtype)
    checker.query_out(q_out, q_scale, "D", model)
    return Key(
        op="rope_store_kv_",
        dtype=dtype_name(q.dtype),
        heads_q=q.shape[1],
        heads_kv=k.shape[1],
        head_dim=q.shape[2],
        v_head_dim=v.shape[2],
        rotary_dim=cos_sin_cache.shape[1],
        interleaved=bool(options.interleaved),
        table_dtype=dtype_name(cos_sin_cache.dtype),
        position_dtype=dtype_name(positions.dtype),
        offset_dtype=optional_dtype(offsets),
        mrope_section=options.mrope_section,
        mrope_interleaved=bool(options.mrope_interleaved),
        q_norm_dtype=optional_dtype(q_norm_weight),
        k_norm_dtype=optional_dtype(k_norm_weight),
        layout=options.layout.value,
        page_size=k_view.page_size,
        k_dim_group=k_view.dim_group,
        v_row_group=v_view.row_group,
        pool_dtype=dtype_name(k_pool.dtype),
        slot_dtype=dtype_name(slot_mapping.dtype),
        window_map_dtype=optional_dtype(window_slot_map),
        k_scale=scale_kind(k_scale),
        v_scale=scale_kind(v_scale),
        write_k=bool(options.write_k),
        q_out_dtype=optional_dtype(q_out),
        q_scale=scale_kind(q_scale),
    )


def _check(args: Args, options: Options) -> None:
    k_pool, cos_sin_cache, positions, slot_mapping, offsets = (
        args[3],
        args[5],
        args[6],
        args[7],
        args[8],
    )
    check_positions("rope_store_kv_", positions, offsets, cos_sin_cache.shape[0])
    check_slots(
        "rope_store_kv_", slot_mapping, pool_slots(k_pool, options.layout), args[15], options
    )


OP = Op(
    "rope_store_kv_",
    rope_store_kv_,
    tensors=(
        "q",
        "k",
        "v",
        "k_pool",
        "v_pool",
        "cos_sin_cache",
        "positions",
        "slot_mapping",
        "offsets?",
        "q_norm_weight?",
        "k_norm_weight?",
        "k_scale?",
        "v_scale?",
        "q_out?",
        "q_scale?",
        "window_slot_map?",
    ),
    options=(
        "layout",
        "interleaved",
        "mrope_section",
        "mrope_interleaved",
        "norm_eps",
        "write_k",
        "padding_slot",
    ),
    schemas={
        overload: _SCHEMA.format(
            q="" if query_out else "(c!)",
            k="(d!)" if write_k else "",
            q_out="(e!)" if query_out else "",
        )
        for (write_k, query_out), overload in OVERLOADS.items()
    },
    key=_key,
    check=_check,
)
