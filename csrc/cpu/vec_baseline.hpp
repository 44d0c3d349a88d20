// No particular instruction set: four lanes, which compilers lower to SSE2, NEON or plain scalars. Also the place
// that says what each function of an instruction set means.
#pragma once

#define ROPOOL_WIDTH 4
#include "vec_types.hpp"
#include "small_float.hpp"

namespace ropool::cpu {
namespace {

// Zero-extends 16-bit lanes to 32 bits.
ROPOOL_INLINE Bits widen16(Raw16 raw) { return __builtin_convertvector(raw, Bits); }

// Keeps the low 16 or 8 bits of each lane; the bits above are zero.
ROPOOL_INLINE Raw16 narrow16(Bits bits) { return __builtin_convertvector(bits, Raw16); }
ROPOOL_INLINE Raw8 narrow8(Bits bits) { return __builtin_convertvector(bits, Raw8); }

// IEEE binary16, round to nearest even, overflow to infinity, NaN stays NaN.
ROPOOL_INLINE Vec float_from_half(Raw16 raw) { return soft_float_from_half(widen16(raw)); }
ROPOOL_INLINE Raw16 half_from_float(Vec v) { return narrow16(soft_half_from_float(v)); }

// Lane 2i gets lane 2i+1 and the other way round.
ROPOOL_INLINE Vec swap_pairs(Vec v) { return Vec{v[1], v[0], v[3], v[2]}; }

// The even and the odd elements of the 2 * kWidth values (a, b).
ROPOOL_INLINE Two deinterleave(Vec a, Vec b) {
    return {Vec{a[0], a[2], b[0], b[2]}, Vec{a[1], a[3], b[1], b[3]}};
}

// The first n < kWidth lanes; nothing beyond them is touched.
template <class Raw>
ROPOOL_INLINE Raw read_raw_part(const std::byte* p, int n) {
    return read_raw_part_by_memcpy<Raw>(p, n);
}
template <class Raw>
ROPOOL_INLINE void write_raw_part(std::byte* p, Raw raw, int n) {
    write_raw_part_by_memcpy(p, raw, n);
}

// Copies 64 bytes to a 64-byte aligned address, past the caches where the machine can.
ROPOOL_INLINE void stream_line(std::byte* dst, const std::byte* src) { __builtin_memcpy(dst, src, 64); }
ROPOOL_INLINE void fence() {}

}  // namespace
}  // namespace ropool::cpu
