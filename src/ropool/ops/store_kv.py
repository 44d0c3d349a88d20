"""`store_kv_`: write keys and values into a paged KV pool, for models that rotate themselves."""

from __future__ import annotations

from torch import Tensor

from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.layouts import KVLayout
from ropool.ops._check import check_slots
from ropool.ops._eager import eager
from ropool.ops._op import Op
from ropool.ops._validate import Checker, dtype_name, optional_dtype, pool_slots, scale_kind


@eager
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
    """Writes `k` and `v` into the pool, without rotating.

    A token whose slot is negative or `padding_slot` is padding and is not written; nor is one whose
    slot is past the pool. Slots must be distinct: of two tokens with one slot, either may win.

    Args:
        k: `[T, Hk, D]`, float16, bfloat16 or float32; any strides, last dimension contiguous.
        v: `[T, Hk, Dv]`, dtype of `k`.
        k_pool, v_pool: the pool, in `layout`; dtype of `k`, or fp8 (float8_e4m3fn, float8_e5m2).
            May be strided views. Modified in place.
        slot_mapping: `[T]`, int32 or int64: the slot that each token goes to. Slot `s` is page `s
            // B`, row `s % B`.
        layout: how the pool is arranged, see `ropool.KVLayout`.
        k_scale, v_scale: `[]`, `[1]` or `[Hk]`, float32, for an fp8 pool: the stored value is `x /
            scale`, saturated to the largest finite value; NaN stays NaN. Without one the scale is
            1.
        window_slot_map: `[N]`, int32 or int64, for sliding-window pools: maps a slot of
            `slot_mapping` to the slot of this pool, looked up after the padding test; a negative
            entry is padding.
        padding_slot: a slot of `slot_mapping` that means padding, beside the negative ones.
        backend: run on this backend or raise; by default the best that can.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written.
        IndexError: with `ROPOOL_CHECK=1`, a slot is out of range; nothing has been written.
    """
    args = (k, v, k_pool, v_pool, slot_mapping, k_scale, v_scale, window_slot_map)
    OP(args, (layout, padding_slot), backend)


def _key(args: Args, options: Options) -> Key:
    k, v, k_pool, v_pool, slot_mapping, k_scale, v_scale, window_slot_map = args
    checker = Checker("store_kv_")
    model = checker.model_dtype("k", k)
    checker.tensor("k", k, ("T", "Hk", "D"), model)
    checker.tensor("v", v, ("T", "Hk", "Dv"), model)
    k_view, v_view = checker.kv_pool(options.layout, k_pool, v_pool, model)
    checker.slots(options, slot_mapping, window_slot_map)
    checker.scale("k_scale", k_scale, "Hk", "k_pool", k_pool.dtype)
    checker.scale("v_scale", v_scale, "Hk", "v_pool", v_pool.dtype)
    return Key(
        op="store_kv_",
        dtype=dtype_name(k.dtype),
        heads_kv=k.shape[1],
        head_dim=k.shape[2],
        v_head_dim=v.shape[2],
        layout=options.layout.value,
        page_size=k_view.page_size,
        k_dim_group=k_view.dim_group,
        v_row_group=v_view.row_group,
        pool_dtype=dtype_name(k_pool.dtype),
        slot_dtype=dtype_name(slot_mapping.dtype),
        window_map_dtype=optional_dtype(window_slot_map),
        k_scale=scale_kind(k_scale),
        v_scale=scale_kind(v_scale),
    )


def _check(args: Args, options: Options) -> None:
    k_pool, slot_mapping = args[2], args[4]
    check_slots("store_kv_", slot_mapping, pool_slots(k_pool, options.layout), args[7], options)


OP = Op(
    "store_kv_",
    store_kv_,
    tensors=(
        "k",
        "v",
        "k_pool",
        "v_pool",
        "slot_mapping",
        "k_scale?",
        "v_scale?",
        "window_slot_map?",
    ),
    options=("layout", "padding_slot"),
    schemas={
        "": """(Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor slot_mapping,
        Tensor? k_scale,
            Tensor? v_scale, Tensor? window_slot_map, str layout, int? padding_slot, str? backend)
            -> ()"""
    },
    key=_key,
    check=_check,
)
