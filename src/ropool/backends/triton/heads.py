# mypy: disable-error-code="no-untyped-def"
"""Tiles of heads `[tokens, heads, dims]`: load, normalise, rotate, round, store.

A rotated head is three tiles: `first` and `second` of its pairs, and `rest`, the dims that the
rotation leaves alone. Every tile is masked to its own width.
"""

import triton
import triton.language as tl

from ropool.backends.triton.rounding import bytes_of_16, to_storage, widen


@triton.jit
def head_block(first, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Head indices `[1, BLOCK]` from `first` on, and which exist."""
    head = first + tl.arange(0, BLOCK)[None, :]
    if HEADS % BLOCK == 0:
        exists = tl.full([1, BLOCK], True, tl.int1)
    else:
        exists = head < HEADS
    return head, exists


@triton.jit
def head_starts(row, head, row_stride, head_stride):
    """Where heads `[1, heads]` of rows `[tokens]` (int64) start: `[tokens, heads, 1]`."""
    return (row[:, None] * row_stride + head.to(tl.int64) * head_stride)[:, :, None]


@triton.jit
def dim_block(BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Dims `[1, 1, BLOCK]`, and which are less than `WIDTH`."""
    dim = tl.arange(0, BLOCK)[None, None, :]
    if WIDTH == BLOCK:
        inside = tl.full([1, 1, BLOCK], True, tl.int1)
    else:
        inside = dim < WIDTH
    return dim, inside


@triton.jit
def load_dims(x, start, mask, FROM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Dims `FROM` to `FROM + WIDTH` of the heads that start at `start`, zeros behind them."""
    dim, inside = dim_block(BLOCK, WIDTH)
    return tl.load(x + start + FROM + dim, mask=mask & inside, other=0.0)


@triton.jit
def load_pairs(
    x, start, mask, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Both dims of every pair, as two tiles, each as stored."""
    if INTERLEAVED:
        pairs = load_dims(x, start, mask, 0, 2 * HALF, 2 * HALF_BLOCK)
        pairs = pairs.reshape(pairs.shape[0], pairs.shape[1], HALF_BLOCK, 2)
        first, second = tl.split(pairs)
    else:
        first = load_dims(x, start, mask, 0, HALF, HALF_BLOCK)
        second = load_dims(x, start, mask, HALF, HALF, HALF_BLOCK)
    return first, second


@triton.jit
def dim_offset(dim, group_stride, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Where a dim of a head stands in a pool tensor that keeps `GROUP` dims together."""
    if GROUP >= WIDTH:
        offset = dim
    elif GROUP == 1:
        offset = dim.to(tl.int64) * group_stride
    else:
        offset = (dim // GROUP).to(tl.int64) * group_stride + dim % GROUP
    return offset


@triton.jit
def store_dims(
    x, start, mask, value, scale, group_stride,
    FROM: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    FORMAT: tl.constexpr, NATIVE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Store a tile of dims `FROM` to `FROM + WIDTH`. `mask` is `[tokens, heads, 1]`."""
    if FORMAT == "bfloat16_bytes":
        code = bytes_of_16(to_storage(value, None, "bfloat16", NATIVE, NATIVE_FP8))
        byte, inside = dim_block(code.shape[2], 2 * WIDTH)
        tl.store(x + start + 2 * FROM + byte, code, mask=mask & inside)
    else:
        code = to_storage(value, scale, FORMAT, NATIVE, NATIVE_FP8)
        dim, inside = dim_block(value.shape[2], WIDTH)
        offset = dim_offset(FROM + dim, group_stride, GROUP, HEAD_DIM)
        tl.store(x + start + offset, code, mask=mask & inside)


@triton.jit
def store_heads(
    x, start, mask, first, second, rest, scale, group_stride,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, REST: tl.constexpr,
    GROUP: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Store rotated heads; the dims behind the rotated ones only with `REST`."""
    if INTERLEAVED:
        pairs = tl.join(first, second)
        pairs = pairs.reshape(pairs.shape[0], pairs.shape[1], 2 * pairs.shape[2])
        store_dims(
            x, start, mask, pairs, scale, group_stride,
            0, 2 * HALF, HEAD_DIM, GROUP, FORMAT, NATIVE, NATIVE_FP8,
        )  # fmt: skip
    else:
        store_dims(
            x, start, mask, first, scale, group_stride,
            0, HALF, HEAD_DIM, GROUP, FORMAT, NATIVE, NATIVE_FP8,
        )  # fmt: skip
        store_dims(
            x, start, mask, second, scale, group_stride,
            HALF, HALF, HEAD_DIM, GROUP, FORMAT, NATIVE, NATIVE_FP8,
        )  # fmt: skip
    if REST:
        store_dims(
            x, start, mask, rest, scale, group_stride,
            2 * HALF, HEAD_DIM - 2 * HALF, HEAD_DIM, GROUP, FORMAT, NATIVE, NATIVE_FP8,
        )  # fmt: skip


@triton.jit
def load_scale(scale, head, exists, KIND: tl.constexpr):
    """The fp8 scale, of all heads or of each (`[1, heads, 1]`), or None."""
    if KIND is None:
        values = None
    elif KIND == "tensor":
        values = tl.load(scale)
    else:
        values = tl.load(scale + head, mask=exists, other=1.0)[:, :, None]
    return values


@triton.jit
def rms_normalise(
    first, second, rest, weight, eps,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    REST_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """RMSNorm over all dims of each head (arXiv:1910.07467); tiles are float32."""
    start = tl.zeros([1, 1, 1], tl.int32)
    everything = tl.full([1, 1, 1], True, tl.int1)
    # The threads of a head exchange what they sum. Were it a product, each would add its own,
    # unrounded, to the rounded one of another, and have a sum of its own in the last bit.
    squares = tl.sum(tl.fma(first, first, second * second), axis=2)
    if REST_BLOCK > 0:
        squares += tl.sum(tl.fma(rest, rest, 0.0), axis=2)
    factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, :, None]
    one, two = load_pairs(weight, start, everything, HALF, HALF_BLOCK, INTERLEAVED)
    first = first * factor * widen(one, NATIVE)
    second = second * factor * widen(two, NATIVE)
    if REST_BLOCK > 0:
        other = load_dims(weight, start, everything, 2 * HALF, HEAD_DIM - 2 * HALF, REST_BLOCK)
        rest = rest * factor * widen(other, NATIVE)
    return first, second, rest


@triton.jit
def rotate(first, second, cos, sin):
    """Turn every pair by its angle; all float32."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def store_latent_tiles(pool, start, mask, value, NATIVE: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """The first 528 bytes of a 656-byte row: 512 e4m3 latents, then a float32 scale for each 128.

    Byte by byte in the source, since a row may stand at any address; the compiler makes 16-byte
    stores of them where the alignment is known.
    """
    tokens: tl.constexpr = value.shape[0]
    tiles = widen(value, NATIVE).reshape(tokens, 4, 128)
    magnitude = tl.where(tiles == tiles, tl.abs(tiles), 0.0)
    largest = tl.minimum(tl.max(magnitude, axis=2), 3.4028234663852886e38)
    scale = tl.maximum(tl.div_rn(largest, 448.0), 1.1754943508222875e-38)
    # A scale lies between 2**-126 and 2**119, so its reciprocal is a normal number.
    inverse = tl.div_rn(1.0, scale)[:, :, None]
    code = to_storage(tiles * inverse, None, "float8_e4m3fn", NATIVE, NATIVE_FP8)
    byte = tl.arange(0, 512)[None, None, :]
    tl.store(pool + start + byte, code.reshape(tokens, 1, 512), mask=mask)
    bits = scale.to(tl.uint32, bitcast=True)[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
    byte = 512 + tl.arange(0, 16)[None, None, :]
    tl.store(pool + start + byte, (bits & 0xFF).to(tl.uint8).reshape(tokens, 1, 16), mask=mask)
