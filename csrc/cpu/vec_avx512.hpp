// AVX-512 (F, BW, DQ, VL): sixteen lanes, tails by mask. See vec_baseline.hpp for what each function means.
#pragma once

#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12's own header starts its "undefined" registers from themselves, and warns of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define ROPOOL_WIDTH 16
#include "vec_types.hpp"

namespace ropool::cpu {
namespace {

ROPOOL_INLINE Bits widen16(Raw16 raw) {
    return bit_cast<Bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(raw)));
}

ROPOOL_INLINE Raw16 narrow16(Bits bits) {
    return bit_cast<Raw16>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
}

ROPOOL_INLINE Raw8 narrow8(Bits bits) { return bit_cast<Raw8>(_mm512_cvtepi32_epi8(bit_cast<__m512i>(bits))); }

ROPOOL_INLINE Vec float_from_half(Raw16 raw) { return bit_cast<Vec>(_mm512_cvtph_ps(bit_cast<__m256i>(raw))); }

ROPOOL_INLINE Raw16 half_from_float(Vec v) {
    return bit_cast<Raw16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}

ROPOOL_INLINE Vec swap_pairs(Vec v) { return bit_cast<Vec>(_mm512_permute_ps(bit_cast<__m512>(v), 0xB1)); }

ROPOOL_INLINE Two deinterleave(Vec a, Vec b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512 x = bit_cast<__m512>(a);
    const __m512 y = bit_cast<__m512>(b);
    return {bit_cast<Vec>(_mm512_permutex2var_ps(x, even, y)), bit_cast<Vec>(_mm512_permutex2var_ps(x, odd, y))};
}

template <class Raw>
ROPOOL_INLINE Raw read_raw_part(const std::byte* p, int n) {
    const __mmask16 mask = static_cast<__mmask16>((1U << n) - 1U);
    if constexpr (sizeof(Raw) == 64) return bit_cast<Raw>(_mm512_maskz_loadu_epi32(mask, p));
    else if constexpr (sizeof(Raw) == 32) return bit_cast<Raw>(_mm256_maskz_loadu_epi16(mask, p));
    else return bit_cast<Raw>(_mm_maskz_loadu_epi8(mask, p));
}

template <class Raw>
ROPOOL_INLINE void write_raw_part(std::byte* p, Raw raw, int n) {
    const __mmask16 mask = static_cast<__mmask16>((1U << n) - 1U);
    if constexpr (sizeof(Raw) == 64) _mm512_mask_storeu_epi32(p, mask, bit_cast<__m512i>(raw));
    else if constexpr (sizeof(Raw) == 32) _mm256_mask_storeu_epi16(p, mask, bit_cast<__m256i>(raw));
    else _mm_mask_storeu_epi8(p, mask, bit_cast<__m128i>(raw));
}

ROPOOL_INLINE void stream_line(std::byte* dst, const std::byte* src) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), _mm512_loadu_si512(src));
}

ROPOOL_INLINE void fence() { _mm_sfence(); }

}  // namespace
}  // namespace ropool::cpu
