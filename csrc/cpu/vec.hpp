// Reading and writing storage types as float32 vectors, written once over the functions of an instruction set.
#pragma once

#include "small_float.hpp"

namespace ropool::cpu {
namespace {

struct F32 {
    using Raw = Bits;
    static constexpr int size = 4;
    static constexpr bool scaled = false;
    static Vec decode(Raw raw) { return bit_cast<Vec>(raw); }
    static Raw encode(Vec v) { return bit_cast<Raw>(v); }
};

struct F16 {
    using Raw = Raw16;
    static constexpr int size = 2;
    static constexpr bool scaled = false;
    static Vec decode(Raw raw) { return float_from_half(raw); }
    static Raw encode(Vec v) { return half_from_float(v); }
};

struct BF16 {
    using Raw = Raw16;
    static constexpr int size = 2;
    static constexpr bool scaled = false;
    static Vec decode(Raw raw) { return bit_cast<Vec>(widen16(raw) << 16); }
    static Raw encode(Vec v) { return narrow16(bfloat_from_float(v)); }
};

struct E4M3 {
    using Raw = Raw8;
    static constexpr int size = 1;
    static constexpr bool scaled = true;
    static Raw encode(Vec v) { return narrow8(fp8_from_float<3, 7>(v, 448.0F)); }
};

struct E5M2 {
    using Raw = Raw8;
    static constexpr int size = 1;
    static constexpr bool scaled = true;
    static Raw encode(Vec v) { return narrow8(fp8_from_float<2, 15>(v, 57344.0F)); }
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
