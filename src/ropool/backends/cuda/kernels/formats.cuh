// Storage formats: raw words in registers, float32 for arithmetic, one rounding at the store.

// Format tags. `size` is in bytes, `is_fp8` says that stores divide by a scale and saturate.
struct F32 { static constexpr int size = 4; static constexpr bool is_fp8 = false; };
struct F16 { static constexpr int size = 2; static constexpr bool is_fp8 = false; };
struct Bf16 { static constexpr int size = 2; static constexpr bool is_fp8 = false; };
struct E4m3 {
  static constexpr int size = 1, mantissa = 3, bias = 7;
  static constexpr bool is_fp8 = true;
  static constexpr u32 largest = 0x7e, nan = 0x7f;
};
struct E5m2 {
  static constexpr int size = 1, mantissa = 2, bias = 15;
  static constexpr bool is_fp8 = true;
  static constexpr u32 largest = 0x7b, nan = 0x7f;
};

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };
template <class A, class B> constexpr bool same = Same<A, B>::value;

template <bool FIRST, class A, class B> struct Either { using type = A; };
template <class A, class B> struct Either<false, A, B> { using type = B; };

// Registers that hold `N` elements of format `F`.
template <class F, int N> constexpr int words = at_least_1(N * F::size / 4);

template <class F> DEVICE float widen(u32 bits) {
  float x;
  if constexpr (same<F, Bf16>) return __uint_as_float(bits << 16);
  else if constexpr (same<F, F16>) {
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(u16(bits)));
    return x;
  } else return __uint_as_float(bits);
}

template <class F, int N> DEVICE void unpack(const u32* w, float* x) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (same<F, F32>) x[i] = __uint_as_float(w[i]);
    else if constexpr (same<F, Bf16>)  // the upper half is a float32 already, once the lower is cleared
      x[i] = i & 1 ? __uint_as_float(w[i / 2] & 0xffff0000u) : __uint_as_float(w[i / 2] << 16);
    else x[i] = widen<F>(i & 1 ? w[i / 2] >> 16 : w[i / 2] & 0xffffu);
  }
}

// One value to fp8: round to nearest even, saturate, keep NaN and subnormals.
template <class F> DEVICE u32 narrow_fp8(float x) {
  constexpr int shift = 23 - F::mantissa;
  const u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return F::nan;
  constexpr u32 smallest_normal = u32(128 - F::bias) << 23;
  u32 code;
  if (magnitude < smallest_normal) {
    // Adding 2^k rounds away the bits below the smallest subnormal.
    constexpr u32 anchor = u32(128 - F::bias + shift) << 23;
    code = __float_as_uint(__uint_as_float(magnitude) + __uint_as_float(anchor)) - anchor;
  } else {
    const u32 rounded = magnitude + ((1u << (shift - 1)) - 1) + (magnitude >> shift & 1u);
    code = (rounded >> shift) - (u32(127 - F::bias) << F::mantissa);
    if (code > F::largest) code = F::largest;
  }
  return sign | code;
}

template <class F> DEVICE u32 narrow_pair(float low, float high) {
  u32 pair = 0;
  if constexpr (same<F, Bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else if constexpr (same<F, F16>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#if __CUDA_ARCH__ >= 890 && !defined(ROPOOL_SOFTWARE_FP8)
  else {
    u16 two;
    if constexpr (same<F, E4m3>)
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
    else
      asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
    pair = two;
  }
#else
  else pair = narrow_fp8<F>(low) | narrow_fp8<F>(high) << 8;
#endif
  return pair;
}

template <class F, int N> DEVICE void pack(const float* x, u32* w) {
  if constexpr (same<F, F32>) {
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = __float_as_uint(x[i]);
  } else if constexpr (N == 1) {
    w[0] = narrow_pair<F>(x[0], 0.0f);
  } else if constexpr (F::size == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) w[i / 2] = narrow_pair<F>(x[i], x[i + 1]);
  } else if constexpr (N == 2) {
    w[0] = narrow_pair<F>(x[0], x[1]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      w[i / 4] = narrow_pair<F>(x[i], x[i + 1]) | narrow_pair<F>(x[i + 2], x[i + 3]) << 16;
  }
}

// `N` floats of format `F`, read `WIDTH` elements at a time.
template <class F, int N, int WIDTH, bool KEEP = false> DEVICE void load_floats(const char* from, float* x) {
  constexpr int W = least(N, WIDTH);
#pragma unroll
  for (int i = 0; i < N; i += W) {
    u32 w[words<F, W>];
    load_cached<W * F::size, KEEP>(from + i * F::size, w);
    unpack<F, W>(w, x + i);
  }
}

// 1 / x. The division operator calls a subroutine for its rare cases, and every kernel with such a call
// has a third more registers, so a third fewer loads in flight. Here they are inline: what is left of 1
// is no number for zeros and infinities, and far from 1 powers of two keep it normal.
DEVICE float inverse_of(float x) {
  const float size = fabsf(x);
  const float factor = size < 1e-30f ? 18446744073709551616.0f : size > 1e30f ? 1.0f / 18446744073709551616.0f : 1.0f;
  const float near = x * factor;
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(near));
  const float rest = fmaf(-near, inverse, 1.0f);
  if (rest == rest) inverse = fmaf(inverse, rest, inverse);
  return inverse * factor;
}

// A quotient as of a division: a product with the inverse alone may round to the other side of a tie of
// the narrow format. What is left over of it is 0 for zeros and no number for infinities, which stay.
DEVICE float divided(float x, float divisor, float inverse) {
  const float quotient = x * inverse, rest = fmaf(-quotient, divisor, x);
  const bool inexact = fabsf(rest) > 0.0f && fabsf(rest) <= 3.402823466e38f;
  return inexact ? fmaf(rest, inverse, quotient) : quotient;
}

template <int N> DEVICE void divide_by(float* x, float divisor) {
  const float inverse = inverse_of(divisor);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = divided(x[i], divisor, inverse);
}

template <int N> DEVICE void scale_by(float* x, float factor) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= factor;
}
