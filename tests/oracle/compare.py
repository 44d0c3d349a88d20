"""Compares memory after a call with what must be there: values where written, bits elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oracle.formats import FORMATS, bounds, decode
from oracle.ops import Expected

Bools = NDArray[np.bool_]


class MismatchError(AssertionError):
    """A call wrote something else, or somewhere else, than it must."""


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the tensor's storage, guard bands and gaps between rows included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def tensors_of(args: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in args.items() if isinstance(value, torch.Tensor)}


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], results: Sequence[Expected]
) -> None:
    """Raise `MismatchError` unless `after` is `before` with exactly `results` written.

    Both map argument names to arguments; tensors that share a storage in one share it in the other.
    """
    _check_untouched(tensors_of(before), tensors_of(after), results)
    for result in results:
        _check_written(after[result.arg], result)


def _as_view(tensor: torch.Tensor, elements: Bools) -> Bools:
    """`elements`, one of each element of the tensor's storage, seen as the tensor sees them."""
    size = elements.itemsize
    strides = [stride * size for stride in tensor.stride()]
    first = elements[tensor.storage_offset() :]
    return np.lib.stride_tricks.as_strided(first, tuple(tensor.shape), strides)


def _written_bytes(tensor: torch.Tensor, results: Sequence[Expected]) -> Bools:
    """For each byte of the storage, whether a result may change it."""
    size = tensor.element_size()
    elements = np.zeros(tensor.untyped_storage().nbytes() // size, dtype=np.bool_)
    view = _as_view(tensor, elements)
    for result in results:
        if result.columns is None:
            view |= result.written
        else:
            width = result.columns.stop - result.columns.start
            wide = np.repeat(result.written, width // result.written.shape[-1], axis=-1)
            view[..., result.columns] |= wide
    return np.repeat(elements, size)


def _check_untouched(
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    results: Sequence[Expected],
) -> None:
    storages: dict[int, list[str]] = {}
    for name, tensor in before.items():
        storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    for names in storages.values():
        old, new = (storage_bytes(args[names[0]]).cpu().numpy() for args in (before, after))
        changed = old != new
        if not changed.any():
            continue
        for name in names:
            mine = [result for result in results if result.arg == name]
            if mine:
                allowed = _written_bytes(before[name], mine)
                changed[: len(allowed)] &= ~allowed
        if changed.any():
            raise MismatchError(_describe_stray(before, names, changed))


def _describe_stray(
    before: Mapping[str, torch.Tensor], names: Sequence[str], changed: Bools
) -> str:
    for name in names:
        size = before[name].element_size()
        whole = np.any(changed[: len(changed) // size * size].reshape(-1, size), axis=1)
        inside = np.argwhere(_as_view(before[name], np.asarray(whole)))
        if len(inside):
            first = inside[0].tolist()
            return f"{name}{first} changed and must not ({len(inside)} elements in all)"
    where = np.flatnonzero(changed)
    return (
        f"byte {where[0]} outside every view of the storage of {'/'.join(names)} changed "
        f"({len(where)} bytes in all)"
    )


def _check_written(tensor: torch.Tensor, result: Expected) -> None:
    got_tensor = tensor.detach().cpu()
    if result.columns is not None:
        got_tensor = got_tensor[..., result.columns].clone(memory_format=torch.contiguous_format)
        got_tensor = got_tensor.view(result.dtype)
    got = decode(got_tensor)
    low, high = bounds(result.dtype, result.value, result.slack)
    nan = np.isnan(result.value)
    with np.errstate(invalid="ignore"):
        right = np.where(nan, np.isnan(got), (low <= got) & (got <= high))
    # What is only copied keeps the sign of its zeros too, where the format has both.
    copied = (result.slack == 0) & ~nan
    if not FORMATS[result.dtype].negative_zero:
        copied &= got != 0
    right &= ~copied | (np.signbit(result.value) == np.signbit(got))
    wrong = result.written & ~right
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise MismatchError(
            f"{result.arg}{list(index)} is {got[index]!r}, expected "
            f"{low[index]!r}..{high[index]!r} (exact {result.value[index]!r} in {result.dtype}); "
            f"{int(wrong.sum())} of {int(result.written.sum())} written elements are wrong"
        )
