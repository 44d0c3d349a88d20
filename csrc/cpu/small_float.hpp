// Rounding float32 to narrower formats with integer arithmetic, eight and sixteen bits alike, on whole vectors.
#pragma once

#include "vec_types.hpp"

namespace ropool::cpu {
namespace {

ROPOOL_INLINE Vec broadcast(float value) { return Vec{} + value; }
ROPOOL_INLINE Bits broadcast_bits(std::uint32_t value) { return Bits{} + value; }

ROPOOL_INLINE Vec magnitude(Vec v) { return bit_cast<Vec>(bit_cast<Bits>(v) & 0x7FFFFFFFU); }

// Magnitude bits of a non-negative number that does not round beyond the format's largest: `mantissa` stored bits and
// exponent bias `bias`, round to nearest even. Below the smallest normal, adding a power of two whose unit in the last
// place is the format's smallest subnormal makes the float32 adder do the rounding.
template <int mantissa, int bias>
ROPOOL_INLINE Bits round_magnitude(Vec v) {
    constexpr int dropped = 23 - mantissa;
    constexpr std::uint32_t smallest_normal = static_cast<std::uint32_t>(127 - bias + 1) << 23;
    constexpr std::uint32_t aligner = static_cast<std::uint32_t>(127 - bias + 1 + dropped) << 23;
    const Bits bits = bit_cast<Bits>(v);
    const Bits even = (bits >> dropped) & 1U;
    const Bits normal =
        ((bits + even + ((1U << (dropped - 1)) - 1U)) >> dropped) - (static_cast<std::uint32_t>(127 - bias) << mantissa);
    const Bits subnormal = bit_cast<Bits>(v + bit_cast<Vec>(broadcast_bits(aligner))) - aligner;
    return bits < smallest_normal ? subnormal : normal;
}

// fp8: saturating, infinities too; NaN becomes the all-ones magnitude. Largest finite value: `largest`.
template <int mantissa, int bias>
ROPOOL_INLINE Bits fp8_from_float(Vec v, float largest) {
    const Vec absolute = magnitude(v);
    const Vec limit = broadcast(largest);
    const Vec saturated = absolute < limit ? absolute : limit;
    const Bits rounded = round_magnitude<mantissa, bias>(saturated);
    const Bits sign = (bit_cast<Bits>(v) >> 24) & 0x80U;
    return sign | (v == v ? rounded : broadcast_bits(0x7FU));
}

ROPOOL_INLINE Bits bfloat_from_float(Vec v) {
    const Bits bits = bit_cast<Bits>(v);
    const Bits rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    const Bits quiet_nan = (bits >> 16) | 0x40U;
    return v == v ? rounded : quiet_nan;
}

// binary16 for machines without the instruction. 65520 is the first value that rounds to infinity.
ROPOOL_INLINE Bits soft_half_from_float(Vec v) {
    const Vec absolute = magnitude(v);
    const Bits finite = absolute < 65520.0F ? round_magnitude<10, 15>(absolute) : broadcast_bits(0x7C00U);
    const Bits sign = (bit_cast<Bits>(v) >> 16) & 0x8000U;
    return sign | (v == v ? finite : broadcast_bits(0x7E00U));
}

ROPOOL_INLINE Vec soft_float_from_half(Bits half) {
    const Bits absolute = half & 0x7FFFU;
    const Bits sign = (half & 0x8000U) << 16;
    // 2^-24 is the weight of a subnormal's last bit.
    const Vec subnormal = __builtin_convertvector(bit_cast<Ints>(absolute), Vec) * 0x1p-24F;
    const Bits rebased = (absolute << 13) + (112U << 23);
    const Bits special = (absolute << 13) | 0x7F800000U;
    const Bits normal = absolute < 0x7C00U ? rebased : special;
    return bit_cast<Vec>(sign | (absolute < 0x0400U ? bit_cast<Bits>(subnormal) : normal));
}

}  // namespace
}  // namespace ropool::cpu
