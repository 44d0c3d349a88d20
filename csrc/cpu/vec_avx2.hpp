// AVX2 + FMA + F16C: eight lanes. See vec_baseline.hpp for what each function means.
#pragma once

#include <immintrin.h>

#define ROPOOL_WIDTH 8
#include "vec_types.hpp"

namespace ropool::cpu {
namespace {

ROPOOL_INLINE Bits widen16(Raw16 raw) {
    return bit_cast<Bits>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(raw)));
}

ROPOOL_INLINE __m128i narrow16_register(Bits bits) {
    const __m256i whole = bit_cast<__m256i>(bits);
    return _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}

ROPOOL_INLINE Raw16 narrow16(Bits bits) { return bit_cast<Raw16>(narrow16_register(bits)); }

ROPOOL_INLINE Raw8 narrow8(Bits bits) {
    const __m128i words = narrow16_register(bits);
    return bit_cast<Raw8>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
}

ROPOOL_INLINE Vec float_from_half(Raw16 raw) { return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(raw))); }

ROPOOL_INLINE Raw16 half_from_float(Vec v) {
    return bit_cast<Raw16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}

ROPOOL_INLINE Vec swap_pairs(Vec v) { return bit_cast<Vec>(_mm256_permute_ps(bit_cast<__m256>(v), 0xB1)); }

ROPOOL_INLINE Two deinterleave(Vec a, Vec b) {
    const __m256 x = bit_cast<__m256>(a);
    const __m256 y = bit_cast<__m256>(b);
    const __m256d even = bit_cast<__m256d>(_mm256_shuffle_ps(x, y, 0x88));
    const __m256d odd = bit_cast<__m256d>(_mm256_shuffle_ps(x, y, 0xDD));
    return {bit_cast<Vec>(_mm256_permute4x64_pd(even, 0xD8)), bit_cast<Vec>(_mm256_permute4x64_pd(odd, 0xD8))};
}

template <class Raw>
ROPOOL_INLINE Raw read_raw_part(const std::byte* p, int n) {
    return read_raw_part_by_memcpy<Raw>(p, n);
}

template <class Raw>
ROPOOL_INLINE void write_raw_part(std::byte* p, Raw raw, int n) {
    write_raw_part_by_memcpy(p, raw, n);
}

ROPOOL_INLINE void stream_line(std::byte* dst, const std::byte* src) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + 32), high);
}

ROPOOL_INLINE void fence() { _mm_sfence(); }

}  // namespace
}  // namespace ropool::cpu
