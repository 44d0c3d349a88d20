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


def pack_cos_sin(cos: Tensor, sin: Tensor, rotary_dim: int, *, interleaved: bool = False) -> Tensor:
    """Allocate and return the `[max_position, R]` table of a model that keeps cosines and sines
    apart, `R` being `rotary_dim`.

    `cos` and `sin` are both `[max_position, R/2]` (half width), or both `[max_position, R]` (full
    width), which holds every frequency at both dims of its pair: `i` and `i + R/2`, or with
    `interleaved` `2i` and `2i + 1`. A packed table of full width is split with `chunk(2, dim=1)`
    first. The result has the dtype and device of `cos`.

    Reads the values, so this is for loading a model. Raises `ValueError` for other shapes, for two
    dtypes, and for dims of a pair that differ.
    """
    if cos.dtype != sin.dtype or cos.shape != sin.shape or cos.dim() != 2:
        raise ValueError(
            f"ropool.rotary: cos is {cos.dtype} {list(cos.shape)}, sin is {sin.dtype} "
            f"{list(sin.shape)}; allowed: two dimensions, both tensors alike"
        )
    half, width = rotary_dim // 2, cos.shape[1]
    if rotary_dim % 2 or width not in (half, rotary_dim):
        raise ValueError(
            f"ropool.rotary: cos has {width} columns and rotary_dim is {rotary_dim}; "
            "allowed: rotary_dim / 2 or rotary_dim columns, rotary_dim even"
        )
    if width == half:
        return torch.cat((cos, sin), dim=1)
    halves = []
    for name, whole in (("cos", cos), ("sin", sin)):
        pairs = (whole[:, ::2], whole[:, 1::2]) if interleaved else whole.split(half, dim=1)
        if not torch.equal(*pairs):
            raise ValueError(
                f"ropool.rotary: {name} has different values at the two dims of a pair; allowed: "
                f"equal ones (interleaved is {interleaved})"
            )
        halves.append(pairs[0])
    return torch.cat(halves, dim=1)
