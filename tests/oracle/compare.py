"""Compares memory after a call with what the oracle expects: values where written, bits everywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from oracle.formats import bounds, decode
from oracle.ops import Expected


class Mismatch(AssertionError):
    """A call wrote something else, or somewhere else, than it must."""


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the tensor's storage, guard bands and gaps between rows included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def tensors_of(args: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in args.items() if isinstance(value, torch.Tensor)}


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], results: Sequence[Expected]
) -> None:
    """Raise `Mismatch` unless `after` is `before` with exactly `results` written.

    Both map argument names to arguments; tensors that share a storage in one share it in the other.
    """
    _check_untouched(tensors_of(before), tensors_of(after), results)
    for result in results:
        _check_written(after[result.arg], result)


def _written_bytes(tensor: torch.Tensor, results: Sequence[Expected]) -> torch.Tensor:
    """For each byte of the storage, whether a result may change it."""
    size = tensor.element_size()
    total = tensor.untyped_storage().nbytes() // size
    elements = torch.zeros(total, dtype=torch.bool)
    view = elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    for result in results:
        written = result.written
        if result.columns is not None:
            width = result.columns.stop - result.columns.start
            written = np.repeat(written, width // written.shape[-1], axis=-1)
            view[..., result.columns] |= torch.from_numpy(written)
        else:
            view |= torch.from_numpy(written)
    return elements.repeat_interleave(size)


def _check_untouched(
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    results: Sequence[Expected],
) -> None:
    storages: dict[int, list[str]] = {}
    for name, tensor in before.items():
        storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    for names in storages.values():
        old, new = storage_bytes(before[names[0]]), storage_bytes(after[names[0]])
        changed = old != new.cpu()
        if not changed.any():
            continue
        for name in names:
            mine = [result for result in results if result.arg == name]
            if mine:
                allowed = _written_bytes(before[name], mine)
                changed[: len(allowed)] &= ~allowed
        if changed.any():
            raise Mismatch(_describe_stray(before, names, changed))


def _describe_stray(
    before: Mapping[str, torch.Tensor], names: Sequence[str], changed: torch.Tensor
) -> str:
    for name in names:
        tensor = before[name]
        whole = changed[: len(changed) // tensor.element_size() * tensor.element_size()]
        elements = whole.view(-1, tensor.element_size()).any(dim=1)
        view = elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if view.any():
            where = view.nonzero()
            return f"{name}{where[0].tolist()} changed and must not ({len(where)} elements in all)"
    where = changed.nonzero()
    return (
        f"byte {where[0].item()} outside every view of the storage of {'/'.join(names)} changed "
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
    # What is only copied keeps the sign of its zeros too.
    copied = (result.slack == 0) & ~nan
    right &= ~copied | (np.signbit(result.value) == np.signbit(got))
    wrong = result.written & ~right
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise Mismatch(
            f"{result.arg}{list(index)} is {got[index]!r}, expected {low[index]!r}..{high[index]!r} "
            f"(exact {result.value[index]!r} in {result.dtype}); "
            f"{int(wrong.sum())} of {int(result.written.sum())} written elements are wrong"
        )
