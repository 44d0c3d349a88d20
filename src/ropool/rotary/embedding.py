"""A table with its config: what a caller of the rotating ops holds on to between calls."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ropool.dispatch.settings import current
from ropool.rotary.config import RotaryConfig, RotaryOptions
from ropool.rotary.frequencies import length_range
from ropool.rotary.table import cos_sin_cache

_AFTER: dict[str | None, tuple[str, ...]] = {
    None: ("rope_", "rope_store_kv_", "rope_store_mla_", "store_kv_", "store_mla_"),
    "rope_": ("store_kv_", "store_mla_"),
}
"""The ops that a layer may call in a step after the one that it called last; none after any that
stores."""
_claims: WeakKeyDictionary[object, dict[int, str]] = WeakKeyDictionary()
"""The op that each layer claimed last in each step; kept only while checks are on."""


class RotaryEmbedding:
    """Holds the cos/sin table of a `RotaryConfig` and hands out what the rotating ops take:

        rope_(q, k, rope.cos_sin_cache, positions, **rope.options)

    `lengths` says for which sequence lengths the table at hand is right:

    - Most variants: 1 to the rows of the table; `prepare` with a greater length makes it longer.
    - LongRoPE: 1 to the original context with the short factors, or every length beyond it, up to
      the rows of the table, with the long ones.
    - Dynamic NTK: 1 to the original context, or one single length beyond it.

    Keys already in a pool keep the frequencies that they were rotated with. So where frequencies
    depend on the length, settle a request's table once: `prepare` for the length it may reach.

    A table is never changed in place: after a `prepare` that returns `True`, `cos_sin_cache` is
    another tensor, so take it anew, and capture CUDA graphs only after it. The table before the
    last is kept, so going back and forth between two ranges of lengths computes nothing.
    """

    def __init__(
        self,
        config: RotaryConfig,
        seq_len: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the table for sequences of `seq_len` tokens, by default `config.max_position`.

        `dtype` and `device` are the table's. Raises `ValueError` when both lengths are `None`.
        """
        length = config.max_position if seq_len is None else seq_len
        if length is None:
            raise ValueError(
                "ropool.RotaryEmbedding: seq_len is None; allowed: an integer above 0, since the "
                "config has no max_position"
            )
        self.config = config
        self.dtype = dtype
        self.device = device
        # By the first length that they are right for; the last entry is the table at hand.
        self._tables: dict[int, Tensor] = {}
        self.prepare(length)

    @property
    def cos_sin_cache(self) -> Tensor:
        """The table at hand, `[rows, R]`, cosines first."""
        return next(reversed(self._tables.values()))

    @property
    def lengths(self) -> tuple[int, int]:
        """The first and the last sequence length that the table at hand is right for."""
        first, table = next(reversed(self._tables.items()))
        return first, len(table)

    @property
    def options(self) -> RotaryOptions:
        """`interleaved`, `mrope_section` and `mrope_interleaved`: keyword arguments of the ops."""
        return self.config.options

    def prepare(self, seq_len: int) -> bool:
        """Make the table right for sequences of `seq_len` tokens; return whether it changed.

        Allocates only when neither of the two tables kept is right. The new one has a row for every
        length that shares its frequencies; where that is without limit it has `seq_len` rows, or
        twice those of the shorter table that it replaces.
        """
        first, last = length_range(self.config, seq_len)
        before = next(reversed(self._tables.values()), None)
        table = self._tables.get(first)
        if table is None or len(table) < seq_len:
            rows = 0 if table is None else 2 * len(table)
            rows = max(seq_len, rows) if last is None else last
            table = cos_sin_cache(self.config, rows, self.dtype, self.device)
        self._tables.pop(first, None)
        self._tables[first] = table
        if len(self._tables) > 2:
            del self._tables[next(iter(self._tables))]
        return table is not before

    @staticmethod
    def claim(step: object, layer: int, op: str) -> None:
        """Say that `layer` is about to call `op`, such as `"rope_store_kv_"`, on its K of `step`,
        an object that stands for one forward pass and can be weakly referenced.

        A layer calls in a step one op that rotates and stores, or `rope_` and then one that stores,
        or only one of these two. With checks on (`ROPOOL_CHECK=1`) anything else raises
        `RuntimeError`, whichever embedding the calls before were claimed with: K would be rotated
        twice, rotated when it is stored already, or stored again by a path that does not know that
        an op has stored it; and an `op` that is none raises `ValueError`. With checks off this does
        nothing.
        """
        if not current().check:
            return
        if op not in _AFTER[None]:
            raise ValueError(
                f"ropool.RotaryEmbedding.claim: op is {op!r}; known: {', '.join(_AFTER[None])}"
            )
        layers = _claims.setdefault(step, {})
        before = layers.get(layer)
        allowed = _AFTER.get(before, ())
        if op not in allowed:
            raise RuntimeError(
                f"ropool.RotaryEmbedding.claim: layer {layer} has called {before} on its K in this "
                f"step, and now {op}; allowed after {before}: {' or '.join(allowed) or 'none'}"
            )
        layers[layer] = op
