"""ropool's kernels as MLX primitives: rotate Q and K and write K and V into a pool, at once.

The extension is built for one release of MLX; any other raises `ImportError` here, before it is
loaded.
"""

from __future__ import annotations

from typing import Any, NoReturn

import mlx.core as mx

from ropool_metal._version import MLX_VERSION, __version__

if mx.__version__ != MLX_VERSION:
    raise ImportError(
        f"ropool-metal {__version__} is built for mlx {MLX_VERSION}, installed is mlx "
        f"{mx.__version__}: pip install mlx=={MLX_VERSION}"
    )

from ropool_metal import _ext

if _ext.mlx_version != MLX_VERSION:
    raise ImportError(
        f"ropool-metal {__version__} was compiled against mlx {_ext.mlx_version}, not "
        f"{MLX_VERSION}: pip install --force-reinstall --no-deps ropool-metal"
    )

has_gpu_kernels: bool = _ext.has_gpu_kernels


_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "inv_freq": (mx.array, _NONE),
    "cos_sin": (mx.array, _NONE),
    "base": (float, int, _NONE),
    "rotary_dim": (int, _NONE),
    "interleaved": (bool,),
    "factor": (float, int),
    "single_dispatch": (bool,),
    "stream": (mx.Stream, mx.Device, mx.DeviceType, _NONE),
}
"""What the arguments are that are no arrays, or need not be."""


def _wrong_type(op: str, error: TypeError, arguments: dict[str, Any]) -> NoReturn:
    """Raise `error`, which the extension gave, as one that names the argument."""
    for name, value in arguments.items():
        if value is error:
            continue
        allowed = _KINDS.get(name, (mx.array,))
        if not isinstance(value, allowed):
            words = ", ".join("None" if kind is _NONE else kind.__name__ for kind in allowed)
            raise TypeError(
                f"ropool_metal.{op}: {name} is of type {type(value).__name__}; allowed: {words}"
            ) from error
    raise error


def rope_pool_fused(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    positions: mx.array,
    slots: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    *,
    inv_freq: mx.array | None = None,
    cos_sin: mx.array | None = None,
    base: float | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    factor: float = 1.0,
    single_dispatch: bool = True,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return `(q_rot, k_rot, k_pool, v_pool)`: Q and K rotated, and the pools with the rotated K
    and V in the rows that `slots` names.

    Lazy: nothing is evaluated. A pool that nothing else holds when it is evaluated is written in
    place (MLX calls that donation); otherwise it is copied first, and the array given stays as it
    was. Arithmetic is float32 with one rounding.

    Args:
        q: `[T, Hq, D]`, float32, float16 or bfloat16, with any strides.
        k, v: `[T, Hk, D]` of the same dtype, with any strides; `Hq` is a multiple of `Hk`.
        positions, slots: `[T]` int32 or int64, each on its own. A slot that is negative or past the
            end writes nothing. Tokens of one call must not share a slot.
        k_pool, v_pool: `[S, Hk, D]` or `[P, B, Hk, D]`, row-contiguous.
        inv_freq: float32 angles a position, `[R/2]`, or `[2, R/2]` whose second row is what float32
            rounded off the first. Positions below 2**24 are exact.
        cos_sin: `[positions, R]`, cosines first, float32 or the model's dtype. A token whose
            position lies outside keeps Q and K as they are and writes nothing.
        base: frequencies `base ** (-2 i / R)`, with `rotary_dim` (`D` by default). Exactly one of
            `inv_freq`, `cos_sin` and `base` is given.
        interleaved: pairs are `(2i, 2i+1)` instead of `(i, i + R/2)`.
        factor: cos and sin are multiplied by it (YaRN, LongRoPE).
        single_dispatch: on a GPU one kernel does all three parts; otherwise three do.

    Raises `ValueError` or `TypeError` naming the argument; `vmap` and gradients raise the first.
    """
    try:
        return _ext.rope_pool_fused(
            q,
            k,
            v,
            positions,
            slots,
            k_pool,
            v_pool,
            inv_freq=inv_freq,
            cos_sin=cos_sin,
            base=base,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
            factor=factor,
            single_dispatch=single_dispatch,
            stream=stream,
        )
    except TypeError as error:
        _wrong_type("rope_pool_fused", error, locals())


def store_pool(
    k: mx.array,
    v: mx.array,
    slots: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    *,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[mx.array, mx.array]:
    """Return `(k_pool, v_pool)` with K and V, `[T, Hk, D]`, in the rows that `slots` names. For
    models that rotate by themselves. Arguments, laziness and errors as in `rope_pool_fused`."""
    try:
        return _ext.store_pool(k, v, slots, k_pool, v_pool, stream=stream)
    except TypeError as error:
        _wrong_type("store_pool", error, locals())


__all__ = ["MLX_VERSION", "__version__", "has_gpu_kernels", "rope_pool_fused", "store_pool"]
