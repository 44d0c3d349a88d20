"""`rope_`: rotate query and key heads in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.ops._check import check_positions
from ropool.ops._eager import eager
from ropool.ops._op import Op, hashable
from ropool.ops._validate import Checker, dtype_name, optional_dtype

_ARGUMENTS = """Tensor cos_sin_cache, Tensor positions, Tensor? offsets, bool interleaved, int[]?
mrope_section,
    bool mrope_interleaved, str? backend) -> ()"""


@eager
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
    """Rotates `q` and `k` in place (rotary position embedding, Su et al. 2021, arXiv:2104.09864).

    The first `R` dims of each head are rotated, dims `R..D` stay as they are. Arithmetic is float32
    with one rounding at the store. A token whose position is outside the cache is left untouched.

    Args:
        q: `[T, Hq, D]`, float16, bfloat16 or float32; any strides, last dimension contiguous.
            Modified in place.
        k: `[T, Hk, D]`, dtype of `q`, or `None`. Modified in place.
        cos_sin_cache: `[max_position, R]`, the first half cos, the second half sin; float32 or the
            dtype of `q`.
        positions: `[T]`, or `[3, T]` (temporal, height, width) with `mrope_section`; int32 or
            int64.
        interleaved: pairs are `(2i, 2i+1)` instead of `(i, i + R/2)` (neox).
        offsets: `[T]`, int32 or int64, added to the positions.
        mrope_section: sizes that add up to `R / 2`: how many frequencies follow the temporal,
            height and width position (M-RoPE, arXiv:2409.12191).
        mrope_interleaved: the three kinds of frequencies alternate (`thwthw...t`) instead of
            standing in sections.
        backend: run on this backend or raise; by default the best that can.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been written.
        IndexError: with `ROPOOL_CHECK=1`, a position is outside the cache; nothing has been
            written.
    """
    args = (q, k, cos_sin_cache, positions, offsets)
    options = (
        interleaved,
        hashable(mrope_section),
        mrope_interleaved,
    )
    OP(args, options, backend)


def _key(args: Args, options: Options) -> Key:
    q, k, cos_sin_cache, positions, offsets = args
    checker = Checker("rope_")
    model = checker.model_dtype("q", q)
    checker.tensor("q", q, ("T", "Hq", "D"), model, written=True)
    if k is not None:
        checker.tensor("k", k, ("T", "Hk", "D"), model, written=True)
        checker.grouped()
    checker.rotary(options, cos_sin_cache, positions, offsets, model, q.shape[2], "q")
    return Key(
        op="rope_",
        dtype=dtype_name(q.dtype),
        heads_q=q.shape[1],
        heads_kv=0 if k is None else k.shape[1],
        head_dim=q.shape[2],
        rotary_dim=cos_sin_cache.shape[1],
        interleaved=bool(options.interleaved),
        table_dtype=dtype_name(cos_sin_cache.dtype),
        position_dtype=dtype_name(positions.dtype),
        offset_dtype=optional_dtype(offsets),
        mrope_section=options.mrope_section,
        mrope_interleaved=bool(options.mrope_interleaved),
    )


def _check(args: Args, options: Options) -> None:
    _, _, cos_sin_cache, positions, offsets = args
    check_positions("rope_", positions, offsets, cos_sin_cache.shape[0])


OP = Op(
    "rope_",
    rope_,
    tensors=("q", "k?", "cos_sin_cache", "positions", "offsets?"),
    options=("interleaved", "mrope_section", "mrope_interleaved"),
    schemas={"": f"(Tensor(a!) q, Tensor(b!)? k, {_ARGUMENTS}"},
    key=_key,
    check=_check,
)
