// Rotates the heads of Q and K and writes K and V into the pool.
//
// The grid is (chunk, token, group of heads). A chunk is 2 V dims of a head: V pairs of the rotary part, or 2 V dims
// that pass through. A thread finds the sines and cosines of its V pairs once and uses them for the kHeadsPerThread
// heads of its group. It loads V elements at once (8 or 16 bytes at V = 4) and holds both elements of each pair before
// it stores one, so that a head may be rotated where it stands. No kernel divides: the host lays out the grid.
//
// Byte floor: Q, K and V read once, both rotations and two pool rows written once, cos/sin or frequencies once a
// group of heads.
//
// The pool is [S, Hk, D], contiguous; a paged one [P, B, Hk, D] is the same memory. Offsets into it are 64-bit.
// A slot outside 0..S-1 is written nowhere; a position outside the table leaves its token unrotated and unwritten.
#include <metal_stdlib>

#include "params.h"

using namespace metal;

// The tests count stores here.
#ifndef ROPOOL_ON_STORE
#define ROPOOL_ON_STORE(address, bytes)
#endif

#define ROPOOL_UNROLL _Pragma("clang loop unroll(full)")

constant int kHeadDim [[function_constant(0)]];
constant int kRotaryDim [[function_constant(1)]];
constant int kHeadsQ [[function_constant(2)]];
constant int kHeadsKV [[function_constant(3)]];
constant int kHeadsPerThread [[function_constant(4)]];
constant bool kInterleaved [[function_constant(5)]];
// 0: frequencies; 1: a float32 cos/sin table; 2: one in the storage type.
constant int kSource [[function_constant(6)]];
constant bool kLongPositions [[function_constant(7)]];
constant bool kLongSlots [[function_constant(8)]];

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T at[V];
};

// V elements from dim `d` of a head on.
template <typename T, int V>
inline Pack<T, V> load(const device T* head, int d, ropool_i64 dim_stride) {
    if (V == 1) {
        Pack<T, V> one;
        one.at[0] = head[d * dim_stride];
        return one;
    }
    return *reinterpret_cast<const device Pack<T, V>*>(head + d);
}

template <typename T, int V>
inline void store(device T* head, int d, Pack<T, V> values) {
    ROPOOL_ON_STORE(head + d, sizeof(values));
    *reinterpret_cast<device Pack<T, V>*>(head + d) = values;
}

inline ropool_i64 index_at(const device uchar* base, ropool_i64 at, bool is_long) {
    return is_long ? ropool_i64(reinterpret_cast<const device long*>(base)[at])
                   : ropool_i64(reinterpret_cast<const device int*>(base)[at]);
}

// The row of the pool that the token is written to; below 0: none.
inline ropool_i64 slot_of(const device uchar* slots, uint token, constant RopePoolParams& params) {
    ropool_i64 slot = index_at(slots, token * params.slot_stride, kLongSlots);
    return slot < params.slots ? slot : -1;
}

// Where the two runs of V dims of a chunk begin; the second may begin at D when V is 1 and dims are odd in number.
struct Chunk {
    int first;
    int second;
    bool rotates;
};

template <int V>
inline Chunk chunk_at(int index) {
    const int pairs = kRotaryDim / 2;
    Chunk chunk;
    chunk.rotates = index * V < pairs;
    if (!chunk.rotates) {
        chunk.first = 2 * index * V;
        chunk.second = chunk.first + V;
    } else if (kInterleaved) {
        chunk.first = 2 * index * V;
        chunk.second = chunk.first + V;
    } else {
        chunk.first = index * V;
        chunk.second = pairs + chunk.first;
    }
    return chunk;
}

template <int V>
struct Rotation {
    float cosine[V];
    float sine[V];
};

// The angle in radians is position * (high + low), computed in twice the precision of float and brought into -pi..pi
// before sin and cos see it: exact enough for any position below 2^24, where float(position) is.
inline void sincos_of(float position, float high, float low, thread float& sine, thread float& cosine) {
    float angle = position * high;
    float rest = metal::fma(position, high, -angle) + position * low;
    float turns = metal::rint(angle * 0.159154943f);
    // 2 pi in three parts, the first two with the bits that make the products exact or nearly so.
    angle = metal::fma(turns, -6.28318548f, angle);
    angle = metal::fma(turns, 1.74845553e-7f, angle);
    angle += rest;
    sine = precise::sin(angle);
    cosine = precise::cos(angle);
}

// The rotation of V pairs, `pair` being the first. False: the position is outside of the table.
template <typename T, int V>
inline bool rotation_of(
    const device uchar* source,
    const device uchar* positions,
    uint token,
    int pair,
    constant RopePoolParams& params,
    thread Rotation<V>& rotation) {
    ropool_i64 position = index_at(positions, token * params.position_stride, kLongPositions);
    const int pairs = kRotaryDim / 2;
    if (kSource == 0) {
        const device float* frequencies = reinterpret_cast<const device float*>(source);
        for (int i = 0; i < V; ++i) {
            sincos_of(float(position), frequencies[pair + i], frequencies[pairs + pair + i], rotation.sine[i],
                      rotation.cosine[i]);
        }
    } else {
        if (position < 0 || position >= params.table_rows) return false;
        ropool_i64 row = position * kRotaryDim;
        for (int i = 0; i < V; ++i) {
            if (kSource == 1) {
                const device float* table = reinterpret_cast<const device float*>(source) + row;
                rotation.cosine[i] = table[pair + i];
                rotation.sine[i] = table[pairs + pair + i];
            } else {
                const device T* table = reinterpret_cast<const device T*>(source) + row;
                rotation.cosine[i] = float(table[pair + i]);
                rotation.sine[i] = float(table[pairs + pair + i]);
            }
        }
    }
    for (int i = 0; i < V; ++i) {
        rotation.cosine[i] *= params.factor;
        rotation.sine[i] *= params.factor;
    }
    return true;
}

// Reads one chunk of a head, rotates it, and stores it once or twice; `copy` may be null.
template <typename T, int V>
inline void move_chunk(
    const device T* from,
    ropool_i64 dim_stride,
    device T* to,
    device T* copy,
    Chunk chunk,
    bool rotates,
    thread const Rotation<V>& rotation) {
    const bool whole = chunk.second < kHeadDim;
    Pack<T, V> halves[2];
    halves[0] = load<T, V>(from, chunk.first, dim_stride);
    if (whole) halves[1] = load<T, V>(from, chunk.second, dim_stride);
    if (rotates) {
        ROPOOL_UNROLL
        for (int i = 0; i < V; ++i) {
            const int a = kInterleaved ? 2 * i : i;
            const int b = kInterleaved ? 2 * i + 1 : V + i;
            float x = float(halves[a / V].at[a % V]);
            float y = float(halves[b / V].at[b % V]);
            halves[a / V].at[a % V] = T(x * rotation.cosine[i] - y * rotation.sine[i]);
            halves[b / V].at[b % V] = T(y * rotation.cosine[i] + x * rotation.sine[i]);
        }
    }
    store<T, V>(to, chunk.first, halves[0]);
    if (whole) store<T, V>(to, chunk.second, halves[1]);
    if (copy != nullptr) {
        store<T, V>(copy, chunk.first, halves[0]);
        if (whole) store<T, V>(copy, chunk.second, halves[1]);
    }
}

template <typename T, int V>
inline void rotate_q(
    const device T* q,
    device T* q_out,
    const device uchar* source,
    const device uchar* positions,
    constant RopePoolParams& params,
    uint3 at,
    uint group) {
    Chunk chunk = chunk_at<V>(at.x);
    Rotation<V> rotation;
    bool rotates = chunk.rotates && rotation_of<T, V>(source, positions, at.y, at.x * V, params, rotation);
    const int end = min(int(group + 1) * kHeadsPerThread, kHeadsQ);
    for (int head = group * kHeadsPerThread; head < end; ++head) {
        const device T* from = q + at.y * params.q.token_stride + head * params.q.head_stride;
        device T* to = q_out + (ropool_i64(at.y) * kHeadsQ + head) * kHeadDim;
        move_chunk<T, V>(from, params.q.dim_stride, to, nullptr, chunk, rotates, rotation);
    }
}

// Whether the token's position is one that the table holds; with frequencies every one is.
inline bool position_is_known(const device uchar* positions, uint token, constant RopePoolParams& params) {
    if (kSource == 0) return true;
    ropool_i64 position = index_at(positions, token * params.position_stride, kLongPositions);
    return position >= 0 && position < params.table_rows;
}

template <typename T, int V>
inline void rotate_k(
    const device T* k,
    device T* k_out,
    device T* k_pool,
    const device uchar* source,
    const device uchar* positions,
    ropool_i64 slot,
    constant RopePoolParams& params,
    uint3 at,
    uint group) {
    Chunk chunk = chunk_at<V>(at.x);
    Rotation<V> rotation;
    bool rotates = chunk.rotates && rotation_of<T, V>(source, positions, at.y, at.x * V, params, rotation);
    const int end = min(int(group + 1) * kHeadsPerThread, kHeadsKV);
    for (int head = group * kHeadsPerThread; head < end; ++head) {
        const device T* from = k + at.y * params.k.token_stride + head * params.k.head_stride;
        device T* to = k_out + (ropool_i64(at.y) * kHeadsKV + head) * kHeadDim;
        device T* row = slot < 0 ? nullptr : k_pool + (slot * kHeadsKV + head) * kHeadDim;
        move_chunk<T, V>(from, params.k.dim_stride, to, row, chunk, rotates, rotation);
    }
}

// One chunk of the heads of a token into its pool row, as it stands. K and V without a rotation.
template <typename T, int V>
inline void copy_rows(
    const device T* from, constant RopePoolRows& rows, device T* pool, ropool_i64 slot, uint3 at, uint group) {
    if (slot < 0) return;
    const int first = 2 * at.x * V;
    const int end = min(int(group + 1) * kHeadsPerThread, kHeadsKV);
    for (int head = group * kHeadsPerThread; head < end; ++head) {
        const device T* source = from + at.y * rows.token_stride + head * rows.head_stride;
        device T* row = pool + (slot * kHeadsKV + head) * kHeadDim;
        store<T, V>(row, first, load<T, V>(source, first, rows.dim_stride));
        if (first + V < kHeadDim) store<T, V>(row, first + V, load<T, V>(source, first + V, rows.dim_stride));
    }
}

template <typename T, int V>
[[kernel]] void rope_q(
    const device T* q [[buffer(0)]],
    const device uchar* positions [[buffer(1)]],
    const device uchar* source [[buffer(2)]],
    device T* q_out [[buffer(3)]],
    constant RopePoolParams& params [[buffer(4)]],
    uint3 at [[thread_position_in_grid]]) {
    rotate_q<T, V>(q, q_out, source, positions, params, at, at.z);
}

template <typename T, int V>
[[kernel]] void rope_k_pool(
    const device T* k [[buffer(0)]],
    const device uchar* positions [[buffer(1)]],
    const device uchar* slots [[buffer(2)]],
    const device uchar* source [[buffer(3)]],
    device T* k_out [[buffer(4)]],
    device T* k_pool [[buffer(5)]],
    constant RopePoolParams& params [[buffer(6)]],
    uint3 at [[thread_position_in_grid]]) {
    ropool_i64 slot = position_is_known(positions, at.y, params) ? slot_of(slots, at.y, params) : -1;
    rotate_k<T, V>(k, k_out, k_pool, source, positions, slot, params, at, at.z);
}

template <typename T, int V>
[[kernel]] void v_to_pool(
    const device T* v [[buffer(0)]],
    const device uchar* slots [[buffer(1)]],
    const device uchar* positions [[buffer(2)]],
    device T* v_pool [[buffer(3)]],
    constant RopePoolParams& params [[buffer(4)]],
    uint3 at [[thread_position_in_grid]]) {
    ropool_i64 slot = position_is_known(positions, at.y, params) ? slot_of(slots, at.y, params) : -1;
    copy_rows<T, V>(v, params.v, v_pool, slot, at, at.z);
}

// K and V of models that rotate by themselves, in one dispatch.
template <typename T, int V>
[[kernel]] void kv_to_pool(
    const device T* k [[buffer(0)]],
    const device T* v [[buffer(1)]],
    const device uchar* slots [[buffer(2)]],
    device T* k_pool [[buffer(3)]],
    device T* v_pool [[buffer(4)]],
    constant RopePoolParams& params [[buffer(5)]],
    uint3 at [[thread_position_in_grid]]) {
    ropool_i64 slot = slot_of(slots, at.y, params);
    copy_rows<T, V>(k, params.k, k_pool, slot, at, at.z);
    copy_rows<T, V>(v, params.v, v_pool, slot, at, at.z);
}

// All of it in one dispatch: the groups of K (with V) stand behind those of Q.
template <typename T, int V>
[[kernel]] void rope_pool_fused(
    const device T* q [[buffer(0)]],
    const device T* k [[buffer(1)]],
    const device T* v [[buffer(2)]],
    const device uchar* positions [[buffer(3)]],
    const device uchar* slots [[buffer(4)]],
    const device uchar* source [[buffer(5)]],
    device T* q_out [[buffer(6)]],
    device T* k_out [[buffer(7)]],
    device T* k_pool [[buffer(8)]],
    device T* v_pool [[buffer(9)]],
    constant RopePoolParams& params [[buffer(10)]],
    uint3 at [[thread_position_in_grid]]) {
    const uint groups_q = uint(kHeadsQ + kHeadsPerThread - 1) / uint(kHeadsPerThread);
    if (at.z < groups_q) {
        rotate_q<T, V>(q, q_out, source, positions, params, at, at.z);
        return;
    }
    ropool_i64 slot = position_is_known(positions, at.y, params) ? slot_of(slots, at.y, params) : -1;
    rotate_k<T, V>(k, k_out, k_pool, source, positions, slot, params, at, at.z - groups_q);
    copy_rows<T, V>(v, params.v, v_pool, slot, at, at.z - groups_q);
}

// A pool that another array shares is copied before it is written: 16 bytes a thread, the last one fewer.
[[kernel]] void copy_pool(
    const device uint4* from [[buffer(0)]],
    device uint4* to [[buffer(1)]],
    constant CopyPoolParams& params [[buffer(2)]],
    uint3 at [[thread_position_in_grid]],
    uint3 grid [[threads_per_grid]]) {
    ropool_i64 index = ropool_i64(at.y) * grid.x + at.x;
    if (params.aligned && 16 * (index + 1) <= params.bytes) {
        ROPOOL_ON_STORE(to + index, 16);
        to[index] = from[index];
        return;
    }
    const device uchar* rest = reinterpret_cast<const device uchar*>(from);
    device uchar* out = reinterpret_cast<device uchar*>(to);
    const ropool_i64 end = min(params.bytes, 16 * (index + 1));
    for (ropool_i64 i = 16 * index; i < end; ++i) {
        ROPOOL_ON_STORE(out + i, 1);
        out[i] = rest[i];
    }
}

// Only Metal's compiler takes attributes at this place.
#ifdef __METAL_VERSION__
#define ROPOOL_NAMED(name) [[host_name(name)]] [[kernel]]
#else
#define ROPOOL_NAMED(name)
#endif
#define ROPOOL_INSTANTIATE(kernel_name, type_name, T, V) \
    template ROPOOL_NAMED(#kernel_name "_" #type_name "_" #V) decltype(kernel_name<T, V>) kernel_name<T, V>;
#define ROPOOL_KERNELS(type_name, T, V)                   \
    ROPOOL_INSTANTIATE(rope_q, type_name, T, V)          \
    ROPOOL_INSTANTIATE(rope_k_pool, type_name, T, V)     \
    ROPOOL_INSTANTIATE(v_to_pool, type_name, T, V)       \
    ROPOOL_INSTANTIATE(kv_to_pool, type_name, T, V)      \
    ROPOOL_INSTANTIATE(rope_pool_fused, type_name, T, V)
#define ROPOOL_WIDTHS(type_name, T) \
    ROPOOL_KERNELS(type_name, T, 1) \
    ROPOOL_KERNELS(type_name, T, 2) \
    ROPOOL_KERNELS(type_name, T, 4)

ROPOOL_WIDTHS(float32, float)
ROPOOL_WIDTHS(float16, half)
ROPOOL_WIDTHS(bfloat16, bfloat)
