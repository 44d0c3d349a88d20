// The vector types of one instruction set, as compiler vector extensions: arithmetic, comparison and selection are
// plain operators, so everything but conversions and shuffles is written once. Needs ROPOOL_WIDTH, the number of
// float32 lanes. Everything is in an anonymous namespace: each instruction set compiles its own private copy.
#pragma once

#include "kernels.hpp"

namespace ropool::cpu {
namespace {

constexpr int kWidth = ROPOOL_WIDTH;
typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t Raw16 __attribute__((vector_size(2 * kWidth)));
typedef std::uint8_t Raw8 __attribute__((vector_size(kWidth)));

struct Two {
    Vec even;
    Vec odd;
};

#define ROPOOL_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

template <class To, class From>
ROPOOL_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <class Raw>
ROPOOL_INLINE Raw read_raw(const std::byte* p) {
    Raw raw;
    __builtin_memcpy(&raw, p, sizeof(raw));
    return raw;
}

template <class Raw>
ROPOOL_INLINE void write_raw(std::byte* p, Raw raw) {
    __builtin_memcpy(p, &raw, sizeof(raw));
}

// The first n < kWidth lanes, the others zero.
template <class Raw>
ROPOOL_INLINE Raw read_raw_part_by_memcpy(const std::byte* p, int n) {
    Raw raw = {};
    __builtin_memcpy(&raw, p, static_cast<std::size_t>(n) * (sizeof(Raw) / kWidth));
    return raw;
}

template <class Raw>
ROPOOL_INLINE void write_raw_part_by_memcpy(std::byte* p, Raw raw, int n) {
    __builtin_memcpy(p, &raw, static_cast<std::size_t>(n) * (sizeof(Raw) / kWidth));
}

}  // namespace
}  // namespace ropool::cpu
