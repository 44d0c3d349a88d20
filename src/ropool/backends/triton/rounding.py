# mypy: disable-error-code="no-untyped-def"
"""Storage formats on the device: widening to float32, and the one rounding at a store.

Where a compiler has a conversion of its own that rounds to nearest even, `NATIVE` takes it;
otherwise integer arithmetic does the same on every device: Triton has no fp8 conversion before
sm_89 and none that saturates on all AMD GPUs, and its interpreter truncates to bfloat16.
"""

import triton
import triton.language as tl


@triton.jit
def widen(x, NATIVE: tl.constexpr):
    """A model-dtype tile as float32."""
    if not NATIVE and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def to_bfloat16(x, NATIVE: tl.constexpr):
    """A float32 tile rounded to bfloat16."""
    if NATIVE:
        narrow = x.to(tl.bfloat16)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        code = tl.where(x == x, rounded, (bits >> 16) | 0x40).to(tl.uint16)
        narrow = code.to(tl.bfloat16, bitcast=True)
    return narrow


@triton.jit
def encode_fp8(
    x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST_BITS: tl.constexpr, FNUZ: tl.constexpr
):
    """A float32 tile as fp8 codes (uint8): saturated, ties to even, subnormals kept, NaN kept.

    `LARGEST_BITS` is the largest finite value as float32 bits. The FNUZ formats have one NaN, which
    stands where the others have -0.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    nan = magnitude > 0x7F800000
    clamped = tl.minimum(magnitude, LARGEST_BITS)
    # Normal numbers: round the mantissa where it is; a carry raises the exponent as it should.
    rounded = clamped + (1 << (SHIFT - 1)) - 1 + ((clamped >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Subnormal ones: the sum with a number whose last place is the format's smallest step.
    MAGIC: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    small = clamped.to(tl.float32, bitcast=True)
    one = tl.full(clamped.shape, MAGIC, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (small + one).to(tl.int32, bitcast=True) - MAGIC
    code = tl.where(clamped < ((128 - BIAS) << 23), subnormal, normal)
    sign = (bits >> 24) & 0x80
    if FNUZ:
        code = tl.where(code == 0, 0, code | sign)
        code = tl.where(nan, 0x80, code)
    else:
        code = tl.where(nan, 0x7F, code) | sign
    return code.to(tl.uint8)


@triton.jit
def to_fp8(x, FORMAT: tl.constexpr, NATIVE: tl.constexpr):
    """A float32 tile as fp8 codes (uint8) of `FORMAT`, saturated; NaN stays NaN."""
    if NATIVE and FORMAT == "float8_e4m3fn":
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif NATIVE and FORMAT == "float8_e5m2":
        x = tl.clamp(x, -57344.0, 57344.0, propagate_nan=tl.PropagateNan.ALL)
        code = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    elif FORMAT == "float8_e4m3fn":
        code = encode_fp8(x, 3, 7, 0x43E00000, False)
    elif FORMAT == "float8_e5m2":
        code = encode_fp8(x, 2, 15, 0x47600000, False)
    elif FORMAT == "float8_e4m3fnuz":
        code = encode_fp8(x, 3, 8, 0x43700000, True)
    else:
        tl.static_assert(FORMAT == "float8_e5m2fnuz")
        code = encode_fp8(x, 2, 16, 0x47600000, True)
    return code


@triton.jit
def to_storage(x, scale, FORMAT: tl.constexpr, NATIVE: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """A tile as it is stored: in dtype `FORMAT`, fp8 divided by `scale` (None: 1) and as codes.

    What is in the format already is copied bit by bit.
    """
    if FORMAT == "float16":
        stored = x.to(tl.float16)
    elif FORMAT == "float32":
        stored = x.to(tl.float32)
    elif FORMAT == "bfloat16":
        if x.dtype == tl.bfloat16:
            stored = x
        else:
            stored = to_bfloat16(widen(x, NATIVE), NATIVE)
    elif scale is None:
        stored = to_fp8(widen(x, NATIVE), FORMAT, NATIVE_FP8)
    else:
        stored = to_fp8(widen(x, NATIVE) / scale, FORMAT, NATIVE_FP8)
    return stored


@triton.jit
def bytes_of_16(x):
    """`[..., W]` 16-bit numbers as `[..., 2 W]` bytes, for rows that may stand at any address."""
    bits = x.to(tl.uint16, bitcast=True)
    pair = tl.join((bits & 0xFF).to(tl.uint8), (bits >> 8).to(tl.uint8))
    return pair.reshape(x.shape[0], x.shape[1], 2 * x.shape[2])
