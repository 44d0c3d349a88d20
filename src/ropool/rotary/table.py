"""The cos/sin table that the rotating ops read, rounded once from float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ropool.rotary.config import RotaryConfig
from ropool.rotary.frequencies import attention_factor, inv_freq
from ropool.rotary.scaling import is_int, require

TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows computed at once: bounds the float64 temporaries of a long table to a few MB.
_CHUNK = 8192


def cos_sin_cache(
    config: RotaryConfig,
    max_position: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Allocate and return the `[max_position, R]` table: row `p` holds `R/2` cosines, then `R/2`
    sines, of `p * inv_freq`, times the attention factor.

    The table is the one of a sequence of `max_position` tokens. Where frequencies depend on the
    length it serves no other lengths than `length_range(config, max_position)`: one length for
    dynamic NTK beyond the original context, one side of the original context for LongRoPE.

    Computed in float64 on the CPU. `dtype` is float32, float16 or bfloat16; the half types are
    rounded from float32. Raises `ValueError` for other dtypes and a `max_position` below 1.
    """
    require(is_int(max_position, 1), "rotary", "max_position", max_position, "an integer above 0")
    allowed = ", ".join(str(allowed) for allowed in TABLE_DTYPES)
    require(dtype in TABLE_DTYPES, "rotary", "dtype", dtype, allowed)
    frequencies = inv_freq(config, max_position)
    factor = attention_factor(config, max_position)
    half = config.rotary_dim // 2
    table = torch.empty(max_position, config.rotary_dim, dtype=dtype)
    for start in range(0, max_position, _CHUNK):
        rows = table[start : start + _CHUNK]
        positions = torch.arange(start, start + len(rows), dtype=torch.float64)
        angles = torch.outer(positions, frequencies)
        rows[:, :half] = angles.cos().mul_(factor)
        rows[:, half:] = angles.sin_().mul_(factor)
    return table.to(device)
