"""`rope_store_mla_`: rotate MLA's query and key rope parts and write the latent row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.ops._check import check_positions, check_slots
from ropool.ops._eager import eager
from ropool.ops._op import OVERLOADS, Op, hashable, overload_of
from ropool.ops._validate import Checker, dtype_name, optional_dtype, scale_kind

_SCHEMA = """(Tensor{q} q_rope, Tensor k_nope, Tensor{k} k_rope, Tensor(a!) pool, Tensor
cos_sin_cache, Tensor positions,
    Tensor slot_mapping, Tensor? offsets, Tensor? scale, Tensor{q_out}? q_out, Tensor? q_scale,
    Tensor? window_slot_map,
    bool interleaved, int[]? mrope_section, bool mrope_interleaved, bool write_k, int? padding_slot,
    str? backend) -> ()"""


@eager
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
    """Rotates `q_rope` in place and writes a row `(k_nope, rotated k_rope)` for each token into the
    latent pool of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    Row formats are those of `store_mla_`. Arithmetic is float32 with one rounding at the store.
    `k_rope` itself is not modified unless `write_k`; `q_rope` is not modified when `q_out` is
    given.

    A token whose slot is negative or `padding_slot` is padding: its query is rotated, the pool is
    not touched. A token whose slot is past the pool is treated alike; one whose position is outside
    the cache is skipped altogether. Slots must be distinct: of two tokens with one slot, either may
    win.

    Args:
        q_rope: `[T, Hq, R]`, float16, bfloat16 or float32; any strides, last dimension contiguous.
            Modified in place, unless `q_out` is given.
        k_nope: `[T, L]`, dtype of `q_rope`: the compressed latent, which is not rotated.
        k_rope: `[T, R]`, dtype of `q_rope`.
        pool: `[S, W]` or `[P, B, W]`, see `store_mla_`. Modified in place.
        cos_sin_cache: `[max_position, R]`, the first half cos, the second half sin; float32 or the
            dtype of `q_rope`.
        positions: `[T]`, or `[3, T]` (temporal, height, width) with `mrope_section`; int32 or
            int64.
        slot_mapping: `[T]`, int32 or int64: the slot that each token's row goes to.
        interleaved: pairs are `(2i, 2i+1)` (DeepSeek's own) instead of `(i, i + R/2)` (neox).
        offsets: `[T]`, int32 or int64, added to the positions.
        mrope_section: sizes that add up to `R / 2`, see `rope_`.
        mrope_interleaved: see `rope_`.
        scale: `[]` or `[1]`, float32, for an fp8 pool: the stored value is `x / scale`, saturated
            to the largest finite value; NaN stays NaN. Without one the scale is 1.
        q_out: `[T, Hq, R]`, dtype of `q_rope` or fp8: the rotated query goes here and `q_rope` is
            not modified.
        q_scale: `[]`, `[1]` or `[Hq]`, float32, for an fp8 `q_out`, as `scale`.
        write_k: also write the rotated key back into `k_rope`.
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
        q_rope,
        k_nope,
        k_rope,
        pool,
        cos_sin_cache,
        positions,
        slot_mapping,
        offsets,
        scale,
        q_out,
        q_scale,
        window_slot_map,
    )
    section = hashable(mrope_section)
    options = (interleaved, section, mrope_interleaved, write_k, padding_slot)
    OP(args, options, backend, overload_of(write_k, q_out))


def _key(args: Args, options: Options) -> Key:
    q_rope, k_nope, k_rope, pool, cos_sin_cache, positions, slot_mapping, *optional = args
    offsets, scale, q_out, q_scale, window_slot_map = optional
    checker = Checker("rope_store_mla_")
    model = checker.model_dtype("q_rope", q_rope)
    checker.tensor("q_rope", q_rope, ("T", "Hq", "R"), model, written=q_out is None)
    checker.tensor("k_nope", k_nope, ("T", "L"), model)
    checker.tensor("k_rope", k_rope, ("T", "R"), model, written=options.write_k)
    row_format = checker.mla_pool(pool, scale, model)
    checker.rotary(
        options, cos_sin_cache, positions, offsets, model, q_rope.shape[2], "q_rope", whole=True
    )
    checker.slots(options, slot_mapping, window_slot_map)
    checker.query_out(q_out, q_scale, "R", model)
    return Key(
        op="rope_store_mla_",
        dtype=dtype_name(q_rope.dtype),
        heads_q=q_rope.shape[1],
        head_dim=q_rope.shape[2],
        latent_dim=k_nope.shape[1],
        rotary_dim=cos_sin_cache.shape[1],
        interleaved=bool(options.interleaved),
        table_dtype=dtype_name(cos_sin_cache.dtype),
        position_dtype=dtype_name(positions.dtype),
        offset_dtype=optional_dtype(offsets),
        mrope_section=options.mrope_section,
        mrope_interleaved=bool(options.mrope_interleaved),
        page_size=pool.shape[1] if pool.dim() == 3 else 1,
        pool_dtype=dtype_name(pool.dtype),
        row_format=row_format,
        slot_dtype=dtype_name(slot_mapping.dtype),
        window_map_dtype=optional_dtype(window_slot_map),
        k_scale=scale_kind(scale),
        write_k=bool(options.write_k),
        q_out_dtype=optional_dtype(q_out),
        q_scale=scale_kind(q_scale),
    )


def _check(args: Args, options: Options) -> None:
    pool, cos_sin_cache, positions, slot_mapping = args[3:7]
    check_positions("rope_store_mla_", positions, args[7], cos_sin_cache.shape[0])
    check_slots("rope_store_mla_", slot_mapping, pool.shape[:-1].numel(), args[11], options)


OP = Op(
    "rope_store_mla_",
    rope_store_mla_,
    tensors=(
        "q_rope",
        "k_nope",
        "k_rope",
        "pool",
        "cos_sin_cache",
        "positions",
        "slot_mapping",
        "offsets?",
        "scale?",
        "q_out?",
        "q_scale?",
        "window_slot_map?",
    ),
    options=("interleaved", "mrope_section", "mrope_interleaved", "write_k", "padding_slot"),
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
