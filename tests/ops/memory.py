"""Tensors inside larger poisoned storages, so that a read or write outside a view is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from oracle.compare import storage_bytes, tensors_of

GUARD_BYTES = 192


def poisoned(count: int, dtype: torch.dtype, rng: np.random.Generator) -> torch.Tensor:
    """`count` elements of random bits: NaN, infinities, integers out of every range."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(rng.integers(0, 256, count * size, dtype=np.uint8)).clone().view(dtype)


def strided(
    shape: Sequence[int],
    dtype: torch.dtype,
    rng: np.random.Generator,
    *,
    order: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    shift: int = 0,
) -> torch.Tensor:
    """A poisoned view of `shape` with guard bands around it.

    `order` lists the dimensions from outermost to innermost in memory (default: as they are).
    `pads[i]` elements of gap follow each step of dimension `i`. `shift` elements come before the
    first one, on top of the guard, so that the first address has an odd alignment.
    """
    order = range(len(shape)) if order is None else order
    pads = [0] * len(shape) if pads is None else pads
    strides, extent = [0] * len(shape), 1
    for dim in reversed(order):
        # A size-1 dimension with a pad gets a stride that fits nothing, as slicing leaves behind.
        strides[dim] = extent + pads[dim]
        extent = strides[dim] * max(shape[dim], 1)
    guard = GUARD_BYTES // torch.empty(0, dtype=dtype).element_size()
    storage = poisoned(extent + 2 * guard + shift, dtype, rng)
    return storage.as_strided(tuple(shape), tuple(strides), guard + shift)


def random_strided(
    shape: Sequence[int], dtype: torch.dtype, rng: np.random.Generator, *, contiguous: int = 1
) -> torch.Tensor:
    """A `strided` view with random order and gaps; the last `contiguous` dimensions stay dense."""
    outer = len(shape) - contiguous
    order = [*rng.permutation(outer).tolist(), *range(outer, len(shape))]
    pads = [int(rng.choice([0, 0, 1, 3, 8, 13])) for _ in range(outer)] + [0] * contiguous
    return strided(shape, dtype, rng, order=order, pads=pads, shift=int(rng.integers(0, 9)))


def placed(args: dict[str, Any], device: str) -> dict[str, Any]:
    """The arguments copied to `device` with whole storages: views keep gaps, guards, overlaps."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies = dict(args)
    for name, tensor in tensors_of(args).items():
        address = tensor.untyped_storage().data_ptr()
        if address not in storages:
            # The whole argument list keeps its storages alive, so an address names one storage.
            copy = storage_bytes(tensor).to(device, copy=True)
            storages[address] = copy.untyped_storage()
        copies[name] = torch.empty(0, dtype=tensor.dtype, device=device).set_(
            storages[address], tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    return copies


def compacted(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with each tensor alone in a dense storage of its own."""
    return {
        name: value.clone(memory_format=torch.contiguous_format)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in args.items()
    }
