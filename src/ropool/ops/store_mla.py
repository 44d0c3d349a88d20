"""`store_mla_`: write `(latent, rope)` rows into an MLA pool, for models that rotate themselves."""

from __future__ import annotations

from torch import Tensor

from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.ops._check import check_slots
from ropool.ops._eager import eager
from ropool.ops._op import Op
from ropool.ops._validate import Checker, dtype_name, optional_dtype, scale_kind


@eager
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
    """Writes a row `(k_nope, k_rope)` for each token into the latent pool of multi-head latent
    attention (DeepSeek-V2, arXiv:2405.04434), without rotating.

    The pool's dtype and width decide the row format: the dtype of `k_nope`, `L + R` wide; fp8, `L +
    R` wide, divided by `scale`; or uint8, 656 wide, for `L = 512` and `R = 64`: 512 float8_e4m3fn
    latents, 4 float32 scales (one for each 128 latents, the largest magnitude / 448), 64 bfloat16
    rope values.

    A token whose slot is negative or `padding_slot` is padding and is not written; nor is one whose
    slot is past the pool. Slots must be distinct: of two tokens with one slot, either may win.

    Args:
        k_nope: `[T, L]`, float16, bfloat16 or float32; any strides, last dimension contiguous.
        k_rope: `[T, R]`, dtype of `k_nope`, rotated already.
        pool: `[S, W]` or `[P, B, W]`, last dimension contiguous. Modified in place.
        slot_mapping: `[T]`, int32 or int64: the slot that each token's row goes to.
        scale: `[]` or `[1]`, float32, for an fp8 pool: the stored value is `x / scale`, saturated
            to the largest finite value; NaN stays NaN. Without one the scale is 1.
        window_slot_map: `[N]`, int32 or int64, for sliding-window pools: maps a slot of
            `slot_mapping` to the slot of this pool, looked up after the padding test; a negative
            entry is padding.
        padding_slot: a slot of `slot_mapping` that means padding, beside the negative ones.
        backend: run on this backend or raise; by default the best that can.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written.
        IndexError: with `ROPOOL_CHECK=1`, a slot is out of range; nothing has been written.
    """
    OP((k_nope, k_rope, pool, slot_mapping, scale, window_slot_map), (padding_slot,), backend)


def _key(args: Args, options: Options) -> Key:
    k_nope, k_rope, pool, slot_mapping, scale, window_slot_map = args
    checker = Checker("store_mla_")
    model = checker.model_dtype("k_nope", k_nope)
    checker.tensor("k_nope", k_nope, ("T", "L"), model)
    checker.tensor("k_rope", k_rope, ("T", "R"), model)
    row_format = checker.mla_pool(pool, scale, model)
    checker.slots(options, slot_mapping, window_slot_map)
    return Key(
        op="store_mla_",
        dtype=dtype_name(k_nope.dtype),
        head_dim=k_rope.shape[1],
        latent_dim=k_nope.shape[1],
        page_size=pool.shape[1] if pool.dim() == 3 else 1,
        pool_dtype=dtype_name(pool.dtype),
        row_format=row_format,
        slot_dtype=dtype_name(slot_mapping.dtype),
        window_map_dtype=optional_dtype(window_slot_map),
        k_scale=scale_kind(scale),
    )


def _check(args: Args, options: Options) -> None:
    pool, slot_mapping = args[2], args[3]
    check_slots("store_mla_", slot_mapping, pool.shape[:-1].numel(), args[5], options)


OP = Op(
    "store_mla_",
    store_mla_,
    tensors=("k_nope", "k_rope", "pool", "slot_mapping", "scale?", "window_slot_map?"),
    options=("padding_slot",),
    schemas={
        "": """(Tensor k_nope, Tensor k_rope, Tensor(a!) pool, Tensor slot_mapping, Tensor? scale,
            Tensor? window_slot_map, int? padding_slot, str? backend) -> ()"""
    },
    key=_key,
    check=_check,
)
