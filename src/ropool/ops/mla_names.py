"""`store_mla_` under the names that serving engines call such a write by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ropool.dispatch import kernels
from ropool.dispatch.select import why_not
from ropool.dispatch.spec import load
from ropool.ops._call import described
from ropool.ops._device import device_of
from ropool.ops.store_mla import store_mla_

FORMS = {"bulk": "cuda", "registers": "cuda", "triton": "triton"}
"""The forms of the write on NVIDIA GPUs, and the backends that have them."""


class Usable(NamedTuple):
    """Whether a form of a write can be used: true or false, with `reason` when it is false."""

    reason: str | None

    def __bool__(self) -> bool:
        return self.reason is None


def set_mla_kv_buffer(
    kv_buffer: Tensor, loc: Tensor, cache_k_nope: Tensor, cache_k_rope: Tensor
) -> None:
    """Writes `(cache_k_nope, cache_k_rope)` into the rows `loc` of `kv_buffer`: `store_mla_` in the
    form of SGLang's function of this name, for code that calls that.

    Args:
        kv_buffer: `[S, W]` or `[S, 1, W]`, a pool as `store_mla_` takes it. Modified in place.
        loc: `[T]`, int32 or int64: the slot that each token's row goes to; negative: padding.
        cache_k_nope: `[T, L]` or `[T, 1, L]`: the latent part.
        cache_k_rope: `[T, R]` or `[T, 1, R]`, rotated already.

    Raises:
        ValueError, TypeError: as `store_mla_`, in its names, and for a part with another number of
            heads than one; nothing has been written.
    """
    store_mla_(*_parts("set_mla_kv_buffer", cache_k_nope, cache_k_rope), kv_buffer, loc)


def can_use_set_mla_kv_buffer(
    kv_buffer: Tensor,
    loc: Tensor,
    cache_k_nope: Tensor,
    cache_k_rope: Tensor,
    *,
    form: str = "bulk",
) -> Usable:
    """Whether a form of `set_mla_kv_buffer` can serve these arguments; nothing is written.

    The write needs no such question: it takes whichever form is the fastest of those that can.

    Args:
        kv_buffer, loc, cache_k_nope, cache_k_rope: as in `set_mla_kv_buffer`.
        form: `bulk` (the bulk copy engine of sm_90 and later), `registers` (16 bytes a thread), or
            `triton`.

    Returns:
        True or false; `reason` says why not.

    Raises:
        ValueError, TypeError: an argument does not fit `store_mla_`, or there is no such form.
    """
    if form not in FORMS:
        raise ValueError(
            f"ropool.can_use_set_mla_kv_buffer: form is {form!r}; known: {', '.join(FORMS)}"
        )
    own = "can_use_set_mla_kv_buffer"
    args = (*_parts(own, cache_k_nope, cache_k_rope), kv_buffer, loc)
    call = described(own, "store_mla_", args, {})
    key, options = call.key()
    device = device_of(kv_buffer.device)
    specs = [spec for spec in kernels("store_mla_") if spec.backend == FORMS[form]]
    reasons = [why_not(spec, device, key) for spec in specs]
    if None not in reasons:
        return Usable(reasons[0])
    if form == "bulk":
        question = load("ropool.backends.cuda.forms:why_not_bulk")
        return Usable(question(key, call.tensors, options, device.arch))
    return Usable(None)


def _rows(function: str, name: str, tensor: Tensor) -> Tensor:
    """`[T, 1, W]` as `[T, W]`. Raises `ValueError` for another number of heads."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 3:
        return tensor
    if tensor.shape[1] != 1:
        raise ValueError(
            f"ropool.{function}: {name} has shape {list(tensor.shape)}, {tensor.shape[1]} heads; "
            "allowed: [T, W] or [T, 1, W], as MLA keeps one row for each token"
        )
    return tensor[:, 0]


def _parts(function: str, nope: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of the rows, without a dimension for heads."""
    return _rows(function, "cache_k_nope", nope), _rows(function, "cache_k_rope", rope)
