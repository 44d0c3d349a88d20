// Vector accesses of raw words. No header of the CUDA toolkit is used, since a user of the kernels has
// none.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE static __device__ __forceinline__

__device__ constexpr int at_least_1(int x) { return x < 1 ? 1 : x; }
__device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Loads of data that is used once. With `AHEAD` they are made where they are written: a plain load the
// compiler moves behind the branch that its value is for, and so behind the slow look at position and
// slot. A relaxed one stays, at the price of its registers.
// `LOADS` says which caches hold the lines: 0 L2 alone, so that L1 keeps the cos/sin rows; 1 the same,
// and L2 drops them first, so that rows on their way to the pool stay and are written out together; 2
// the same, and L2 brings the whole line of 128 bytes, for threads whose units are shorter; 3 L1 too. In
// long calls the last is up to 8 % faster on an H200, most where less is written than read.
#if AHEAD
#define LOAD "ld.relaxed.cta.global"
#else
#define LOAD "ld.global"
#endif
#if LOADS == 1
#define STREAM LOAD ".L1::no_allocate.L2::cache_hint"
#define STREAM_POLICY(n) ", %" #n
#elif LOADS == 2
#define STREAM LOAD ".L1::no_allocate.L2::128B"
#define STREAM_POLICY(n)
#elif LOADS == 3
#define STREAM LOAD
#define STREAM_POLICY(n)
#else
#define STREAM LOAD ".L1::no_allocate"
#define STREAM_POLICY(n)
#endif

DEVICE u64 dropped_first() {
  u64 policy = 0;
  if constexpr (LOADS == 1) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

template <int BYTES> DEVICE void load_stream(const char* from, u32* w) {
  [[maybe_unused]] const u64 policy = dropped_first();
  if constexpr (BYTES == 32)  // sm_100 and later
    asm volatile(STREAM ".v8.b32 {%0,%1,%2,%3,%4,%5,%6,%7}, [%8]" STREAM_POLICY(9) ";"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]), "=r"(w[4]), "=r"(w[5]), "=r"(w[6]), "=r"(w[7])
                 : "l"(from), "l"(policy));
  else if constexpr (BYTES == 16)
    asm volatile(STREAM ".v4.u32 {%0,%1,%2,%3}, [%4]" STREAM_POLICY(5) ";"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from), "l"(policy));
  else if constexpr (BYTES == 8)
    asm volatile(STREAM ".v2.u32 {%0,%1}, [%2]" STREAM_POLICY(3) ";"
                 : "=r"(w[0]), "=r"(w[1]) : "l"(from), "l"(policy));
  else if constexpr (BYTES == 4)
    asm volatile(STREAM ".u32 %0, [%1]" STREAM_POLICY(2) ";" : "=r"(w[0]) : "l"(from), "l"(policy));
  else {
    static_assert(BYTES == 2, "the model dtypes have 2 or 4 bytes");
    u16 half;
    asm volatile(STREAM ".u16 %0, [%1]" STREAM_POLICY(2) ";" : "=h"(half) : "l"(from), "l"(policy));
    w[0] = half;
  }
}

// Loads of what other threads read too. `KEEP` asks L2 to drop it last: the cos/sin rows come back again
// and again while far more data streams past.
template <int BYTES, bool KEEP> DEVICE void load_cached(const char* from, u32* w) {
  if constexpr (BYTES == 16 && KEEP) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(LOAD ".L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from), "l"(policy));
  } else if constexpr (BYTES == 16) {
    asm volatile(LOAD ".v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from));
  } else if constexpr (BYTES == 8) {
    asm volatile(LOAD ".v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(from));
  } else if constexpr (BYTES == 4) {
    asm volatile(LOAD ".u32 %0, [%1];" : "=r"(w[0]) : "l"(from));
  } else {
    u16 half;
    asm volatile(LOAD ".u16 %0, [%1];" : "=h"(half) : "l"(from));
    w[0] = half;
  }
}

// Write `RUN` bytes from byte `offset` of the words `w` on, in one access.
template <int RUN> DEVICE void store_run(char* to, const u32* w, int offset) {
  const u32* from = w + offset / 4;
  if constexpr (RUN == 32)
    asm volatile("st.global.v8.b32 [%0], {%1,%2,%3,%4,%5,%6,%7,%8};" ::"l"(to), "r"(from[0]), "r"(from[1]),
                 "r"(from[2]), "r"(from[3]), "r"(from[4]), "r"(from[5]), "r"(from[6]), "r"(from[7])
                 : "memory");
  else if constexpr (RUN == 16)
    *reinterpret_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  else if constexpr (RUN == 8)
    *reinterpret_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  else if constexpr (RUN == 4)
    *reinterpret_cast<u32*>(to) = from[0];
  else if constexpr (RUN == 2)
    *reinterpret_cast<u16*>(to) = u16(from[0] >> 8 * (offset & 3));
  else
    *reinterpret_cast<u8*>(to) = u8(from[0] >> 8 * (offset & 3));
}

// Write `BYTES` bytes from byte `offset` of `w` on, to an address that is a multiple of `ALIGN`.
template <int BYTES, int ALIGN> DEVICE void store_bytes(char* to, const u32* w, int offset = 0) {
  constexpr int RUN = least(BYTES, ALIGN);
#pragma unroll
  for (int b = 0; b < BYTES; b += RUN) store_run<RUN>(to + b, w, offset + b);
}

// `EARLY`: before the previous kernel has finished, so past L1, where an old value could stay behind.
template <class INT, bool EARLY> DEVICE i64 load_index(const char* base, i64 at) {
  const char* from = base + at * i64(sizeof(INT));
  if constexpr (sizeof(INT) == 8) {
    i64 value;
    if constexpr (EARLY) asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(from));
    else asm volatile("ld.global.s64 %0, [%1];" : "=l"(value) : "l"(from));
    return value;
  } else {
    int value;
    if constexpr (EARLY) asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from));
    else asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
  }
}

DEVICE void prefetch(const char* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
