"""The Triton kernel of the 2025 baseline, apart because importing it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_part(  # type: ignore[no-untyped-def]
    pool, latent, rope, slots, pool_stride, latent_stride, rope_stride,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies `BLOCK` elements of one token's row, from the latent or from the rope part."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    at = first + tl.arange(0, BLOCK)
    target = pool + tl.load(slots + token).to(tl.int64) * pool_stride + at
    if first < LATENT:
        tl.store(target, tl.load(latent + token * latent_stride + at))
    else:
        inside = at < LATENT + ROPE
        part = tl.load(rope + token * rope_stride + at - LATENT, mask=inside)
        tl.store(target, part, mask=inside)
