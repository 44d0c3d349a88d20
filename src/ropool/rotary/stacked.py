"""One table for sequences of every length, where frequencies change with the length."""

from __future__ import annotations

import torch

from ropool.rotary.config import RotaryConfig, RotaryOptions
from ropool.rotary.embedding import RotaryEmbedding
from ropool.rotary.frequencies import length_range
from ropool.rotary.table import cos_sin_cache


class StackedRotary:
    """Holds the tables of all sequence lengths up to `max_position` in one tensor, so that
    sequences of different lengths share a call of a rotating op.

    With LongRoPE the rows of the long factors stand below those of the short ones: a token of a
    sequence of `n` tokens rotates by row `position + offset(n)`. A sequence that grows past
    `switch` tokens needs all its keys rotated anew, as they keep the frequencies that they were
    stored with. With every other variant there is one table, and `offset` is 0.

    Attributes:
        config: whose rotation it is.
        cos_sin_cache: the table, `[rows, R]`.
        switch: the greatest length with the short factors, which is also their number of rows;
            `None` when no length up to `max_position` has others.
    """

    def __init__(
        self,
        config: RotaryConfig,
        max_position: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the table. Raises `ValueError` when the lengths up to `max_position` have more
        than two tables (dynamic NTK beyond the original context)."""
        last = length_range(config, 1)[1]
        self.config = config
        self.switch = last if last is not None and last < max_position else None
        tables = [cos_sin_cache(config, self.switch or max_position, dtype, device)]
        if self.switch is not None:
            if length_range(config, self.switch + 1)[1] is not None:
                raise ValueError(
                    f"ropool.StackedRotary: max_position is {max_position}; allowed: at most "
                    f"{self.switch}, since every length beyond it has frequencies of its own"
                )
            tables.append(cos_sin_cache(config, max_position, dtype, device))
        self.cos_sin_cache = torch.cat(tables) if len(tables) > 1 else tables[0]

    @property
    def options(self) -> RotaryOptions:
        """`interleaved`, `mrope_section` and `mrope_interleaved`: keyword arguments of the ops."""
        return self.config.options

    claim = staticmethod(RotaryEmbedding.claim)

    def offset(self, seq_len: int) -> int:
        """What is added to the positions of a sequence of `seq_len` tokens."""
        return self.switch if self.switch is not None and seq_len > self.switch else 0
