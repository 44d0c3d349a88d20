// Reading and writing storage types as float32 vectors, written once over the functions of an instruction set.
#pragma once

#include "small_float.hpp"

namespace ropool::cpu {
namespace {

struct F32 {
    using Raw = Bits;
    static constexpr int size = 4;
    static constexpr bool scaled = false;
    ROPOOL_INLINE Vec decode(Raw raw) { return bit_cast<Vec>(raw); }
    ROPOOL_INLINE Raw encode(Vec v) { return bit_cast<Raw>(v); }
};

struct F16 {
    using Raw = Raw16;
    static constexpr int size = 2;
    static constexpr bool scaled = false;
    ROPOOL_INLINE Vec decode(Raw raw) { return float_from_half(raw); }
    ROPOOL_INLINE Raw encode(Vec v) { return half_from_float(v); }
};

struct BF16 {
    using Raw = Raw16;
    static constexpr int size = 2;
    static constexpr bool scaled = false;
    ROPOOL_INLINE Vec decode(Raw raw) { return bit_cast<Vec>(widen16(raw) << 16); }
    ROPOOL_INLINE Raw encode(Vec v) { return narrow16(bfloat_from_float(v)); }
};

struct E4M3 {
    using Raw = Raw8;
    static constexpr int size = 1;
    static constexpr bool scaled = true;
    ROPOOL_INLINE Bits bits(Vec v) { return fp8_from_float<3, 7>(v, 448.0F); }
    ROPOOL_INLINE Raw encode(Vec v) { return narrow8(bits(v)); }
};

struct E5M2 {
    using Raw = Raw8;
    static constexpr int size = 1;
    static constexpr bool scaled = true;
    ROPOOL_INLINE Bits bits(Vec v) { return fp8_from_float<2, 15>(v, 57344.0F); }
    ROPOOL_INLINE Raw encode(Vec v) { return narrow8(bits(v)); }
};

// Element `i` onwards of an array of T: a whole vector, or its first n lanes.
template <class T>
ROPOOL_INLINE Vec load(const std::byte* p, std::int64_t i) {
    return T::decode(read_raw<typename T::Raw>(p + i * T::size));
}

template <class T>
ROPOOL_INLINE Vec load_part(const std::byte* p, std::int64_t i, int n) {
    return T::decode(read_raw_part<typename T::Raw>(p + i * T::size, n));
}

template <class T>
ROPOOL_INLINE void store(std::byte* p, std::int64_t i, Vec v) {
    write_raw(p + i * T::size, T::encode(v));
}

template <class T>
ROPOOL_INLINE void store_part(std::byte* p, std::int64_t i, Vec v, int n) {
    write_raw_part(p + i * T::size, T::encode(v), n);
}

// Blocks of 2 * kWidth bfloat16 values, two to a 32-bit lane: their even and odd elements are a shift and a mask away
// from float32, and go back the same way, where one vector at a time would need lane-crossing packs.
constexpr int kBlock = 2 * kWidth;

ROPOOL_INLINE Two load_block(const std::byte* p, std::int64_t i) {
    const Bits raw = read_raw<Bits>(p + i * BF16::size);
    return {bit_cast<Vec>(raw << 16), bit_cast<Vec>(raw & 0xFFFF0000U)};
}

// Without a test for NaN: every NaN that reaches it came from a bfloat16, from a canonical_nan or from the arithmetic,
// so its low half is zero and rounding does not carry out of it.
ROPOOL_INLINE Bits round_to_high_half(Vec v) {
    const Bits bits = bit_cast<Bits>(v);
    return bits + 0x7FFFU + ((bits >> 16) & 1U);
}

ROPOOL_INLINE Vec canonical_nan(Vec v) { return v == v ? v : bit_cast<Vec>(broadcast_bits(0x7FC00000U)); }

template <class Out>
ROPOOL_INLINE void store_block(std::byte* p, std::int64_t i, Two v) {
    if constexpr (Out::scaled) {
        write_raw(p + i * Out::size, narrow16(Out::bits(v.even) | Out::bits(v.odd) << 8));
    } else {
        write_raw(p + i * BF16::size,
                  (round_to_high_half(v.even) >> 16) | (round_to_high_half(v.odd) & 0xFFFF0000U));
    }
}

ROPOOL_INLINE const std::byte* bytes(const float* p) { return reinterpret_cast<const std::byte*>(p); }
ROPOOL_INLINE std::byte* bytes(float* p) { return reinterpret_cast<std::byte*>(p); }

ROPOOL_INLINE float sum(Vec v) {
    float lanes[kWidth];
    __builtin_memcpy(lanes, &v, sizeof(v));
    for (int step = kWidth / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    }
    return lanes[0];
}

}  // namespace
}  // namespace ropool::cpu
