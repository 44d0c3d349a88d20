// What the host tells a kernel at run time. Read by C++ and by Metal, so it holds nothing but numbers of fixed size.
// Strides are elements; what is static in a call is a function constant instead (see rope_pool.metal).
#pragma once

#ifdef __METAL_VERSION__
typedef long ropool_i64;
typedef int ropool_i32;
#else
#include <cstdint>
typedef std::int64_t ropool_i64;
typedef std::int32_t ropool_i32;
#endif

struct RopePoolRows {
    ropool_i64 token_stride;
    ropool_i64 head_stride;
    ropool_i64 dim_stride;  // 1 unless one element is loaded at a time
};

struct RopePoolParams {
    RopePoolRows q, k, v;
    ropool_i64 position_stride;
    ropool_i64 slot_stride;
    ropool_i64 slots;       // S: slots of the pool
    ropool_i64 table_rows;  // positions that the cos/sin table holds
    float factor;           // cos and sin are multiplied by it
    ropool_i32 padding;
};

struct CopyPoolParams {
    ropool_i64 bytes;
    ropool_i32 aligned;  // both buffers begin at a multiple of 16 bytes
    ropool_i32 padding;
};
