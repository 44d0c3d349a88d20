// AArch64 NEON: four lanes, with the binary16 conversions of the base architecture. See vec_baseline.hpp for what each
// function means.
#pragma once

#include <arm_neon.h>

#define ROPOOL_WIDTH 4
#include "vec_types.hpp"

namespace ropool::cpu {
namespace {

ROPOOL_INLINE Bits widen16(Raw16 raw) { return bit_cast<Bits>(vmovl_u16(bit_cast<uint16x4_t>(raw))); }

ROPOOL_INLINE Raw16 narrow16(Bits bits) { return bit_cast<Raw16>(vmovn_u32(bit_cast<uint32x4_t>(bits))); }

ROPOOL_INLINE Raw8 narrow8(Bits bits) {
    const uint16x4_t words = vmovn_u32(bit_cast<uint32x4_t>(bits));
    return bit_cast<Raw8>(vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0));
}

ROPOOL_INLINE Vec float_from_half(Raw16 raw) { return bit_cast<Vec>(vcvt_f32_f16(bit_cast<float16x4_t>(raw))); }

ROPOOL_INLINE Raw16 half_from_float(Vec v) { return bit_cast<Raw16>(vcvt_f16_f32(bit_cast<float32x4_t>(v))); }

ROPOOL_INLINE Vec swap_pairs(Vec v) { return bit_cast<Vec>(vrev64q_f32(bit_cast<float32x4_t>(v))); }

ROPOOL_INLINE Two deinterleave(Vec a, Vec b) {
    const float32x4_t x = bit_cast<float32x4_t>(a);
    const float32x4_t y = bit_cast<float32x4_t>(b);
    return {bit_cast<Vec>(vuzp1q_f32(x, y)), bit_cast<Vec>(vuzp2q_f32(x, y))};
}

template <class Raw>
ROPOOL_INLINE Raw read_raw_part(const std::byte* p, int n) {
    return read_raw_part_by_memcpy<Raw>(p, n);
}

template <class Raw>
ROPOOL_INLINE void write_raw_part(std::byte* p, Raw raw, int n) {
    write_raw_part_by_memcpy(p, raw, n);
}

// AArch64 compilers reach the non-temporal pair store only through their own builtins; an ordinary copy it is.
ROPOOL_INLINE void stream_line(std::byte* dst, const std::byte* src) { __builtin_memcpy(dst, src, 64); }
ROPOOL_INLINE void fence() {}

}  // namespace
}  // namespace ropool::cpu
