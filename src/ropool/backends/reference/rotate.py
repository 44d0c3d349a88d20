"""Which tokens take part, and the rotation: RMSNorm, cos/sin look-up, both pair styles."""

from __future__ import annotations

import torch
from torch import Tensor


def token_positions(
    positions: Tensor, offsets: Tensor | None, max_position: int
) -> tuple[Tensor, Tensor]:
    """Positions with offsets added, and the indices of the tokens whose positions all lie in the
    cache."""
    where = positions.long() if offsets is None else positions.long() + offsets.long()
    inside = (where >= 0) & (where < max_position)
    if inside.dim() == 2:
        inside = inside.all(dim=0)
    return where, inside.nonzero().squeeze(1)


def gather_cos_sin(
    cos_sin_cache: Tensor,
    positions: Tensor,
    mrope_section: tuple[int, ...] | None,
    mrope_interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """cos and sin `[n, 1, R/2]` in float32 of valid positions `[n]` or `[3, n]`."""
    rows = cos_sin_cache[positions].float()
    if mrope_section is not None:
        stream = mrope_streams(mrope_section, mrope_interleaved).to(rows.device).repeat(2)
        rows = rows.gather(0, stream.expand(1, *rows.shape[1:])).squeeze(0)
    cos, sin = rows.chunk(2, dim=-1)
    return cos.unsqueeze(1), sin.unsqueeze(1)


def mrope_streams(section: tuple[int, ...], interleaved: bool) -> Tensor:
    """`[R/2]`: which of the three positions each frequency follows."""
    if not interleaved:
        return torch.arange(3).repeat_interleave(torch.tensor(section))
    stream = torch.zeros(sum(section), dtype=torch.long)
    for row in (1, 2):
        stream[row : 3 * section[row] : 3] = row
    return stream


def normalise(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the head dimension (arXiv:1910.07467), or `x` without a weight."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first `R` dims of float32 heads `[n, H, D]`."""
    rotary_dim = 2 * cos.shape[-1]
    part, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = part.chunk(2, dim=-1)
    halves = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(halves, dim=-1).flatten(-2) if interleaved else torch.cat(halves, dim=-1)
    return torch.cat((rotated, rest), dim=-1)
