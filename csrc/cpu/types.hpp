// Plain descriptions of one call: what is static (Call) and where the data stands (Pointers). No torch, no Python and
// no inline code, so that any front end can fill them and every instruction-set unit can include them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ropool::cpu {

enum class DType : std::uint8_t { none, f32, f16, bf16, e4m3, e5m2 };
enum class IntType : std::uint8_t { none, i32, i64 };

// A [T, heads, dim] tensor with contiguous dims. All strides in this file are bytes.
struct Rows {
    DType dtype = DType::none;
    std::int64_t heads = 0;
    std::int64_t dim = 0;
    std::int64_t token_stride = 0;
    std::int64_t head_stride = 0;
};

// A vector of int32 or int64; `stream_stride` leads from one row of [3, T] positions to the next.
struct Indices {
    IntType type = IntType::none;
    std::int64_t size = 0;
    std::int64_t stride = 0;
    std::int64_t stream_stride = 0;
};

// Where element (slot, head, dim) of a pool tensor stands: see ropool.layouts.PlaneView, of which this is the mirror
// with byte strides.
struct Plane {
    DType dtype = DType::none;
    std::int64_t pages = 0;
    std::int64_t page_size = 1;
    std::int64_t row_group = 1;
    std::int64_t dim_group = 1;
    std::int64_t page_stride = 0;
    std::int64_t head_stride = 0;
    std::int64_t row_group_stride = 0;
    std::int64_t row_stride = 0;
    std::int64_t dim_group_stride = 0;
    std::int64_t dim_stride = 0;
};

// float32 scales: `stride` 0 reads the first one for every head.
struct Scales {
    bool present = false;
    std::int64_t stride = 0;
};

// cos/sin cache and what chooses its rows; `rotary_dim` 0 means that the op does not rotate.
struct Rotary {
    std::int64_t rotary_dim = 0;
    bool interleaved = false;
    DType table_dtype = DType::none;
    std::int64_t max_position = 0;
    std::int64_t row_stride = 0;
    Indices positions;
    Indices offsets;
    // For [3, T] positions: which stream (0, 1, 2) frequency i < R/2 follows. Empty for [T] positions.
    std::vector<std::uint8_t> streams;
};

// All five ops are this one call. The MLA ops have one key head (the rope part) and one "value" head (the latent),
// whose planes are two column ranges of the same pool row.
struct Call {
    std::int64_t tokens = 0;
    Rows q, k, v;  // heads == 0: absent
    Rows q_out;    // dtype none: Q is rotated in place
    Rotary rotary;
    DType q_norm = DType::none;
    DType k_norm = DType::none;
    float norm_eps = 0.0F;
    Plane k_pool, v_pool;  // dtype none: no pool
    // The value row is the 656-byte MLA row: e4m3 latents and one float32 scale a 128 of them, `tile_scales` bytes on.
    bool v_tiles = false;
    std::int64_t tile_scales = 0;
    Indices slots;
    Indices window;
    std::int64_t padding_slot = -1;
    Scales q_scale, k_scale, v_scale;
    bool write_k = false;
};

// Base address of each tensor of the call; absent ones stay null.
struct Pointers {
    std::byte* q = nullptr;
    std::byte* k = nullptr;
    const std::byte* v = nullptr;
    std::byte* q_out = nullptr;
    std::byte* k_pool = nullptr;
    std::byte* v_pool = nullptr;
    const std::byte* table = nullptr;
    const std::byte* positions = nullptr;
    const std::byte* offsets = nullptr;
    const std::byte* slots = nullptr;
    const std::byte* window = nullptr;
    const std::byte* q_norm = nullptr;
    const std::byte* k_norm = nullptr;
    const std::byte* q_scale = nullptr;
    const std::byte* k_scale = nullptr;
    const std::byte* v_scale = nullptr;
};

}  // namespace ropool::cpu
