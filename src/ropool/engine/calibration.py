"""Finds the scales of an fp8 pool from what the model itself wants to store."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ropool.engine.cache import KVCache
from ropool.engine.inputs import PromptInputs
from ropool.engine.scales import CacheScales, scale_names
from ropool.errors import RopoolError

CALIBRATION_TOKENS = 1024
"""Prompts are taken in order while they have no more tokens than this together; the first one in
any case."""
HEADROOM = 2.0
"""Later values may be so many times the largest one seen before they saturate. That costs no
precision but that of the smallest, since fp8 is a floating-point format."""


Prompt = tuple[Sequence[int], PromptInputs | None]


def within_limit(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those that are calibrated on."""
    totals = itertools.accumulate(len(tokens) for tokens, _ in prompts)
    fitting = sum(total <= CALIBRATION_TOKENS for total in totals)
    return list(prompts[: max(fitting, 1)])


class Calibration:
    """Watches a pool in the model's dtype while prompts are computed in it."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._largest = self._look()

    def look(self) -> None:
        """Take note of what is in the pool; after every step, since pages of a window come and
        go."""
        found = self._look()
        self._largest = [torch.maximum(*pair) for pair in zip(self._largest, found, strict=True)]

    def scales(self, dtype: torch.dtype) -> CacheScales:
        """For a pool of `dtype`: for each layer and head the smallest power of two with which it
        stores `HEADROOM` times the largest value seen; 1 where nothing but zeros was seen.

        A power of two changes no digit of a value, only which are too large or too small to store.

        Raises `RopoolError` where a value was not finite.
        """
        most = torch.finfo(dtype).max
        values = []
        for name, largest in zip(scale_names(self._cache.spec), self._largest, strict=True):
            for layer, row in enumerate(largest):
                if not row.isfinite().all():
                    raise RopoolError(
                        f"{name} of layer {layer} cannot be calibrated: the model's values are not "
                        "finite"
                    )
            least = (largest * (HEADROOM / most)).clamp(min=torch.finfo(torch.float32).tiny)
            values.append(torch.where(largest > 0, least.log2().ceil().exp2(), 1.0))
        return CacheScales(tuple(values))

    def _look(self) -> list[Tensor]:
        """The largest absolute values in the pool: of K and of V, each `[layers, Hk]`, or of the
        latent rows, `[layers]`."""
        cache = self._cache
        if cache.latent_layers:
            return [torch.stack([layer.rows.abs().amax().float() for layer in cache.latent_layers])]
        pairs = [(layer.k, layer.v) for layer in cache.layers]
        return [
            torch.stack([tensor.abs().amax((0, 1, 3)).float() for tensor in tensors])
            for tensors in zip(*pairs, strict=True)
        ]
