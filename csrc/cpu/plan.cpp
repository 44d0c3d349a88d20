#include "plan.hpp"

#include <algorithm>
#include <stdexcept>

#include "isa.hpp"

namespace ropool::cpu {
namespace {

// A token that is more than one piece of so many is cut between its heads too.
constexpr std::int64_t kPieces = 8;
// Each thread takes at least so many pieces, each within these sizes: small, and threads end together; large, and few
// of the rows are the first of a piece, which nobody has asked for early.
constexpr std::int64_t kPiecesPerThread = 2;
constexpr std::int64_t kLeastPieceBytes = 8 * 1024;
constexpr std::int64_t kMostPieceBytes = 1024 * 1024;
// Bytes written to the pool above which they may go past the caches: pool rows that are free have not been touched for
// long, and an ordinary store would first read them.
constexpr std::int64_t kStreamBytes = 16 * 1024;

}  // namespace

std::int64_t row_bytes(const Rows& rows) { return rows.heads * rows.dim * size_of(rows.dtype); }

Plan::Route Plan::route(const Plane& plane, DType source, std::int64_t dim, bool computed) {
    if (plane.dtype == DType::none) return Route::none;
    const std::int64_t size = size_of(plane.dtype);
    if (plane.dim_group > 1 && plane.dim_stride != size) {
        throw std::invalid_argument("the dims of a pool group must be contiguous");
    }
    if (!computed && plane.dtype == source) return Route::copy;
    return plane.dim_group >= dim ? Route::direct : Route::staged;
}

Plan::Plan(Call call)
    : call_(std::move(call)), kernels_(kernels()), k_offsets_(call_.k_pool), v_offsets_(call_.v_pool) {
    const Rotary& rotary = call_.rotary;
    const bool rotates = rotary.rotary_dim > 0;
    const auto heads = [&](DType in, DType out, bool norm) {
        const HeadsFn fn = kernels_.heads(in, out, rotary.interleaved, norm);
        if (fn == nullptr) throw std::invalid_argument("no kernel for this pair of storage types");
        return fn;
    };
    if (call_.q.heads > 0) {
        const DType out = call_.q_out.dtype == DType::none ? call_.q.dtype : call_.q_out.dtype;
        q_heads_ = heads(call_.q.dtype, out, call_.q_norm != DType::none);
    }
    if (call_.k.heads > 0) {
        const bool norm = call_.k_norm != DType::none;
        const bool changed = rotates || norm;
        const bool written_back = call_.write_k && changed;
        if (written_back) k_back_ = heads(call_.k.dtype, call_.k.dtype, norm);
        // Once K is written back, a pool of the same type takes a copy of it.
        const bool computed = changed && !(written_back && call_.k_pool.dtype == call_.k.dtype);
        k_route_ = route(call_.k_pool, call_.k.dtype, call_.k.dim, computed);
        if (k_route_ == Route::direct || k_route_ == Route::staged) {
            k_store_ = heads(call_.k.dtype, call_.k_pool.dtype, norm);
        }
    }
    if (call_.v.heads > 0) {
        v_route_ = call_.v_tiles ? Route::tiles : route(call_.v_pool, call_.v.dtype, call_.v.dim, false);
        if (v_route_ == Route::direct || v_route_ == Route::staged) {
            v_store_ = heads(call_.v.dtype, call_.v_pool.dtype, false);
        }
    }
    if (rotates) {
        const DType model = call_.q.heads > 0 ? call_.q.dtype : call_.k.dtype;
        const bool as_it_stands = rotary.table_dtype == DType::f32 && model != DType::bf16 && !rotary.interleaved &&
                                  rotary.streams.empty();
        if (!as_it_stands) table_ = kernels_.table(rotary.table_dtype, model, rotary.interleaved);
        for (const std::uint8_t stream : rotary.streams) {
            mask1_.push_back(stream == 1 ? ~0U : 0U);
            mask2_.push_back(stream == 2 ? ~0U : 0U);
        }
    }
    const Plane& pool = call_.k_pool.dtype != DType::none ? call_.k_pool : call_.v_pool;
    slots_ = pool.pages * pool.page_size;

    const std::int64_t read = row_bytes(call_.q) + row_bytes(call_.k) + row_bytes(call_.v);
    const std::int64_t stored = call_.k.heads * call_.k.dim * size_of(call_.k_pool.dtype) +
                                call_.v.heads * call_.v.dim * size_of(call_.v_pool.dtype);
    const std::int64_t token_bytes = std::max<std::int64_t>(1, read + row_bytes(call_.q) + stored);
    bytes_ = token_bytes * call_.tokens;
    stream_ = stored * call_.tokens >= kStreamBytes;
    if (!threaded()) return;
    // Few wide tokens: cut between heads too, so that every thread has some.
    const std::int64_t most_parts = std::max<std::int64_t>(1, std::max(call_.k.heads, call_.q.heads));
    parts_ = std::clamp<std::int64_t>(token_bytes / std::max(bytes_ / kPieces, kLeastPieceBytes), 1, most_parts);
}

std::int64_t Plan::grain(int threads) const {
    const std::int64_t units = call_.tokens * parts_;
    if (threads == 1) return units;
    const std::int64_t piece_bytes =
        std::clamp(bytes_ / (kPiecesPerThread * threads), kLeastPieceBytes, kMostPieceBytes);
    return std::max<std::int64_t>(1, piece_bytes * units / bytes_);
}

}  // namespace ropool::cpu
