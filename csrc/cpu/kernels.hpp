// What every instruction set provides: a table of functions, each of which handles one token. Only plain types and
// declarations here: this header is compiled with and without vector flags, and an inline function in it could leak
// vector instructions into code that runs on machines without them.
#pragma once

#include "types.hpp"

namespace ropool::cpu {

// Some heads of one token: read, optionally RMS-normed, rotated, and written once. `dst` may be `src`.
struct Heads {
    const std::byte* src;
    std::int64_t src_stride;
    std::byte* dst;
    std::int64_t dst_stride;
    std::int64_t heads;
    std::int64_t dim;
    std::int64_t rotary_dim;  // 0: every dim passes through
    const float* cos;         // what the table kernel made; for float32 and float16 neox heads also the
    const float* sin;         // R/2 values as they stand in a float32 table
    const float* weight;      // norm only
    float eps;
    const std::byte* scale;  // null: 1
    std::int64_t scale_stride;
    std::int64_t ahead;  // bytes between a line that is asked for and the line in use
};
using HeadsFn = void (*)(const Heads&);

// One cos/sin row as float32, in the order in which the heads of a model dtype read it. rows[1], rows[2] and the masks
// are read only if `mask1` is not null: lanes whose mask is all ones come from that row.
struct TableRow {
    const std::byte* rows[3];
    const std::uint32_t* mask1;
    const std::uint32_t* mask2;
    std::int64_t half;
    float* cos;
    float* sin;
};
using TableFn = void (*)(const TableRow&);

struct Kernels {
    HeadsFn (*heads)(DType in, DType out, bool interleaved, bool norm);
    TableFn (*table)(DType table, DType model, bool interleaved);
    // The 656-byte row's latent part: `dim` values in tiles of 128 to e4m3, one float32 scale a tile.
    void (*tiles)(DType in, const std::byte* src, std::byte* dst, std::byte* scales, std::int64_t dim);
    void (*widen)(DType in, const std::byte* src, float* dst, std::int64_t count);
    // Copy past the caches; both ends of `dst` are multiples of 64 bytes.
    void (*stream_copy)(std::byte* dst, const std::byte* src, std::int64_t bytes);
    // Orders streamed stores before everything that follows.
    void (*stream_fence)();
};

}  // namespace ropool::cpu
