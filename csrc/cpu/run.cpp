// The token loop of all five ops.
//
// A unit of work is one token, or a group of its heads when a token alone is large; threads take runs of units. A unit
// resolves its cos/sin row and its slot, then moves its heads of Q, K and V, each with one kernel call. Byte floor: Q
// read and written once, K and V read once, their pool rows written once, positions, slots and cos/sin rows read once.

#include <algorithm>
#include <cstring>

#include "plan.hpp"
#include "thread_pool.hpp"

namespace ropool::cpu {
namespace {

std::int64_t read_index(const Indices& indices, const std::byte* base, std::int64_t at) {
    const std::byte* p = base + at * indices.stride;
    if (indices.type == IntType::i64) {
        std::int64_t value;
        std::memcpy(&value, p, sizeof(value));
        return value;
    }
    std::int32_t value;
    std::memcpy(&value, p, sizeof(value));
    return value;
}

// Scratch of a thread, kept for its lifetime; it grows to what the widest call so far needed.
float* scratch(std::int64_t floats) {
    thread_local std::vector<float> memory;
    if (static_cast<std::int64_t>(memory.size()) < floats) memory.resize(static_cast<std::size_t>(floats));
    return memory.data();
}

// Tokens between asking for a row and using it; twice that for rows of which only the page is asked for.
constexpr std::int64_t kAhead = 4;
// Bytes between asking for a line of Q, K or V and using it: the machine's own look-ahead ends with each page. Heads go
// line by line, rows that are copied are asked for as a whole.
constexpr std::int64_t kHeadsAhead = 4096;
constexpr std::int64_t kCopyAhead = 2048;

template <bool write>
void prefetch(const std::byte* p, std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, write);
}

bool multiple_of_line(std::int64_t value) { return value % 64 == 0; }

// Whether whole 64-byte lines of `plane` can be streamed for rows of `row_bytes`.
bool streamable(const Plane& plane, const std::byte* base, std::int64_t dim) {
    return plane.dim_group >= dim && multiple_of_line(reinterpret_cast<std::intptr_t>(base)) &&
           multiple_of_line(dim * size_of(plane.dtype)) && multiple_of_line(plane.page_stride) &&
           multiple_of_line(plane.head_stride) && multiple_of_line(plane.row_group_stride) &&
           multiple_of_line(plane.row_stride);
}

std::int64_t slot_offset(const Plane& plane, std::int64_t slot) {
    const std::int64_t page = slot / plane.page_size;
    const std::int64_t row = slot % plane.page_size;
    return page * plane.page_stride + row / plane.row_group * plane.row_group_stride +
           row % plane.row_group * plane.row_stride;
}

template <int size>
void scatter_elements(const Plane& plane, std::byte* dst, const std::byte* src, std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; ++d) std::memcpy(dst + d * plane.dim_group_stride, src + d * size, size);
}

// One head's `dim` stored values into its dim groups.
void scatter(const Plane& plane, std::byte* dst, const std::byte* src, std::int64_t dim) {
    const std::int64_t size = size_of(plane.dtype);
    if (plane.dim_group > 1) {
        const std::int64_t group = plane.dim_group * size;
        const std::int64_t bytes = dim * size;
        for (std::int64_t at = 0; at < bytes; at += group, dst += plane.dim_group_stride) {
            if (group == 16) std::memcpy(dst, src + at, 16);
            else std::memcpy(dst, src + at, static_cast<std::size_t>(std::min(group, bytes - at)));
        }
    } else if (size == 4) {
        scatter_elements<4>(plane, dst, src, dim);
    } else if (size == 2) {
        scatter_elements<2>(plane, dst, src, dim);
    } else {
        scatter_elements<1>(plane, dst, src, dim);
    }
}

}  // namespace

// One thread's view of a call.
class Worker {
public:
    Worker(const Plan& plan, const Pointers& pointers, bool stream_k, bool stream_v)
        : plan_(plan), call_(plan.call_), at_(pointers), stream_k_(stream_k), stream_v_(stream_v) {
        const std::int64_t rotary = call_.rotary.rotary_dim;
        const std::int64_t staged = std::max(call_.k.heads * call_.k.dim, call_.v.heads * call_.v.dim);
        float* memory = scratch(2 * rotary + call_.q.dim + call_.k.dim + staged);
        cos_ = memory;
        sin_ = memory + rotary;
        q_weight_ = weight(call_.q_norm, at_.q_norm, memory + 2 * rotary, call_.q.dim);
        k_weight_ = weight(call_.k_norm, at_.k_norm, memory + 2 * rotary + call_.q.dim, call_.k.dim);
        stage_ = reinterpret_cast<std::byte*>(memory + 2 * rotary + call_.q.dim + call_.k.dim);
    }

    void units(std::int64_t begin, std::int64_t end) {
        const std::int64_t ahead = stream_k_ ? 2 * kAhead : kAhead;
        const std::int64_t first = begin / plan_.parts_;
        const std::int64_t last = (end - 1) / plan_.parts_;
        announce_first(first);
        for (std::int64_t t = first + 1; t < first + ahead && t <= last; ++t) announce(t);
        for (std::int64_t unit = begin; unit < end; ++unit) {
            const std::int64_t t = unit / plan_.parts_;
            const std::int64_t part = unit % plan_.parts_;
            if (part == 0) {
                if (t + ahead <= last) announce(t + ahead);
                announce_copied(t, last);
            }
            heads_ahead_ = t < last ? kHeadsAhead : 0;
            token(t, part);
        }
        if (stream_k_ || stream_v_) plan_.kernels_.stream_fence();
    }

private:
    struct HeadRange {
        std::int64_t first;
        std::int64_t count;
    };

    const float* weight(DType dtype, const std::byte* src, float* space, std::int64_t dim) const {
        if (dtype == DType::none) return nullptr;
        plan_.kernels_.widen(dtype, src, space, dim);
        return space;
    }

    HeadRange share(std::int64_t heads, std::int64_t part) const {
        const std::int64_t first = heads * part / plan_.parts_;
        return {first, heads * (part + 1) / plan_.parts_ - first};
    }

    void token(std::int64_t t, std::int64_t part) {
        if (call_.rotary.rotary_dim > 0 && !find_rotation(t)) return;
        if (call_.q.heads > 0) move_q(t, share(call_.q.heads, part));
        const std::int64_t slot = plan_.slots_ > 0 ? find_slot(t) : -1;
        if (call_.k.heads > 0) move_k(t, slot, share(call_.k.heads, part));
        if (call_.v.heads > 0 && slot >= 0) move_v(t, slot, share(call_.v.heads, part));
    }

    // The first token has none before it that would hide the wait for its rows: all are asked for at once.
    void announce_first(std::int64_t t) const {
        if (call_.q.heads > 0) announce_heads(call_.q, at_.q, t);
        announce(t);
        if (call_.k.heads > 0) announce_heads(call_.k, at_.k, t);
        if (call_.v.heads > 0) announce_heads(call_.v, at_.v, t);
    }

    static void announce_heads(const Rows& rows, const std::byte* base, std::int64_t t) {
        const std::byte* row = base + t * rows.token_stride;
        const std::int64_t bytes = rows.dim * size_of(rows.dtype);
        for (std::int64_t h = 0; h < rows.heads; ++h) prefetch<false>(row + h * rows.head_stride, bytes);
    }

    // Positions and slots jump about: the pages of a row (and the lines, unless they are streamed past the caches) are
    // asked for a few tokens early.
    void announce(std::int64_t t) const {
        if (call_.rotary.rotary_dim > 0) {
            const std::byte* row = table_row(t, 0);
            const std::int64_t bytes = call_.rotary.rotary_dim * size_of(call_.rotary.table_dtype);
            if (row != nullptr) prefetch<false>(row, bytes);
        }
        const std::int64_t slot = plan_.slots_ > 0 ? find_slot(t) : -1;
        if (slot < 0) return;
        if (call_.k.heads > 0) announce_row(call_.k_pool, at_.k_pool, slot, call_.k, stream_k_);
        if (call_.v.heads > 0) announce_row(call_.v_pool, at_.v_pool, slot, call_.v, stream_v_);
    }

    // K and V that no heads kernel reads.
    void announce_copied(std::int64_t t, std::int64_t last) const {
        if (plan_.k_route_ == Plan::Route::copy && plan_.k_back_ == nullptr) announce_source(call_.k, at_.k, t, last);
        if (plan_.v_route_ != Plan::Route::none) announce_source(call_.v, at_.v, t, last);
    }

    static void announce_source(const Rows& rows, const std::byte* base, std::int64_t t, std::int64_t last) {
        const std::int64_t bytes = row_bytes(rows);
        t += std::max<std::int64_t>(1, kCopyAhead / bytes);
        if (t > last) return;
        const std::byte* row = base + t * rows.token_stride;
        const bool whole = rows.head_stride * rows.heads == bytes;
        for (std::int64_t h = 0; h < (whole ? 1 : rows.heads); ++h) {
            prefetch<false>(row + h * rows.head_stride, whole ? bytes : bytes / rows.heads);
        }
    }

    static void announce_row(const Plane& plane, const std::byte* base, std::int64_t slot, const Rows& rows,
                             bool stream) {
        if (plane.dim_group < rows.dim) return;
        const std::byte* row = base + slot_offset(plane, slot);
        std::int64_t bytes = rows.dim * size_of(plane.dtype);
        std::int64_t pieces = rows.heads;
        if (plane.head_stride == bytes) {
            bytes *= pieces;
            pieces = 1;
        }
        for (std::int64_t i = 0; i < pieces; ++i) prefetch<true>(row + i * plane.head_stride, stream ? 1 : bytes);
    }

    // Null: the position lies outside the cache.
    const std::byte* table_row(std::int64_t t, int stream) const {
        const Rotary& rotary = call_.rotary;
        std::int64_t position = read_index(rotary.positions, at_.positions + stream * rotary.positions.stream_stride, t);
        if (rotary.offsets.type != IntType::none &&
            __builtin_add_overflow(position, read_index(rotary.offsets, at_.offsets, t), &position)) {
            return nullptr;
        }
        if (position < 0 || position >= rotary.max_position) return nullptr;
        return at_.table + position * rotary.row_stride;
    }

    // False: a position of the token lies outside the cache.
    bool find_rotation(std::int64_t t) {
        const Rotary& rotary = call_.rotary;
        const int streams = rotary.streams.empty() ? 1 : 3;
        TableRow row = {};
        for (int s = 0; s < streams; ++s) {
            row.rows[s] = table_row(t, s);
            if (row.rows[s] == nullptr) return false;
        }
        if (plan_.table_ == nullptr) {
            row_cos_ = reinterpret_cast<const float*>(row.rows[0]);
            row_sin_ = row_cos_ + rotary.rotary_dim / 2;
            return true;
        }
        row.mask1 = streams == 1 ? nullptr : plan_.mask1_.data();
        row.mask2 = plan_.mask2_.data();
        row.half = rotary.rotary_dim / 2;
        row.cos = cos_;
        row.sin = sin_;
        plan_.table_(row);
        row_cos_ = cos_;
        row_sin_ = sin_;
        return true;
    }

    // Negative: the token is padding, or its slot lies outside the pool or the map.
    std::int64_t find_slot(std::int64_t t) const {
        std::int64_t slot = read_index(call_.slots, at_.slots, t);
        if (slot < 0 || slot == call_.padding_slot) return -1;
        if (call_.window.type != IntType::none) {
            if (slot >= call_.window.size) return -1;
            slot = read_index(call_.window, at_.window, slot);
        }
        return slot < plan_.slots_ ? slot : -1;
    }

    Heads job(const Rows& rows, const std::byte* base, std::int64_t t, HeadRange range) const {
        Heads heads = {};
        heads.src = base + t * rows.token_stride + range.first * rows.head_stride;
        heads.src_stride = rows.head_stride;
        heads.heads = range.count;
        heads.dim = rows.dim;
        heads.eps = call_.norm_eps;
        heads.ahead = heads_ahead_;
        return heads;
    }

    void with_rotation(Heads& heads, const float* weight) const {
        heads.rotary_dim = call_.rotary.rotary_dim;
        heads.cos = row_cos_;
        heads.sin = row_sin_;
        heads.weight = weight;
    }

    static void with_scale(Heads& heads, const Scales& scales, const std::byte* base, HeadRange range) {
        if (!scales.present) return;
        heads.scale = base + range.first * scales.stride;
        heads.scale_stride = scales.stride;
    }

    void move_q(std::int64_t t, HeadRange range) const {
        Heads heads = job(call_.q, at_.q, t, range);
        with_rotation(heads, q_weight_);
        with_scale(heads, call_.q_scale, at_.q_scale, range);
        const bool in_place = call_.q_out.dtype == DType::none;
        const Rows& out = in_place ? call_.q : call_.q_out;
        heads.dst = (in_place ? at_.q : at_.q_out) + t * out.token_stride + range.first * out.head_stride;
        heads.dst_stride = out.head_stride;
        plan_.q_heads_(heads);
    }

    // K is read for the pool before it is overwritten, unless the pool takes a copy of what is written back.
    void move_k(std::int64_t t, std::int64_t slot, HeadRange range) {
        Heads heads = job(call_.k, at_.k, t, range);
        with_rotation(heads, k_weight_);
        const bool copies = plan_.k_route_ == Plan::Route::copy;
        if (slot >= 0 && !copies) {
            with_scale(heads, call_.k_scale, at_.k_scale, range);
            store(plan_.k_route_, plan_.k_store_, heads, call_.k_pool, at_.k_pool, slot, range, stream_k_);
            heads.scale = nullptr;
        }
        if (plan_.k_back_ != nullptr) {
            heads.dst = at_.k + (heads.src - at_.k);
            heads.dst_stride = heads.src_stride;
            plan_.k_back_(heads);
        }
        if (slot >= 0 && copies) {
            store(plan_.k_route_, nullptr, heads, call_.k_pool, at_.k_pool, slot, range, stream_k_);
        }
    }

    void move_v(std::int64_t t, std::int64_t slot, HeadRange range) {
        Heads heads = job(call_.v, at_.v, t, range);
        if (plan_.v_route_ == Plan::Route::tiles) {
            if (range.count == 0) return;
            std::byte* row = at_.v_pool + slot_offset(call_.v_pool, slot);
            plan_.kernels_.tiles(call_.v.dtype, heads.src, row, row + call_.tile_scales, call_.v.dim);
            return;
        }
        with_scale(heads, call_.v_scale, at_.v_scale, range);
        store(plan_.v_route_, plan_.v_store_, heads, call_.v_pool, at_.v_pool, slot, range, stream_v_);
    }

    void store(Plan::Route route, HeadsFn fn, Heads& heads, const Plane& plane, std::byte* base, std::int64_t slot,
               HeadRange range, bool stream) {
        std::byte* row = base + slot_offset(plane, slot) + range.first * plane.head_stride;
        const std::byte* from = heads.src;
        std::int64_t from_stride = heads.src_stride;
        if (route != Plan::Route::copy) {
            const bool direct = route == Plan::Route::direct && !stream;
            heads.dst = direct ? row : stage_;
            heads.dst_stride = direct ? plane.head_stride : heads.dim * size_of(plane.dtype);
            fn(heads);
            if (direct) return;
            from = stage_;
            from_stride = heads.dst_stride;
        }
        put(plane, row, from, from_stride, heads.dim, range.count, stream);
    }

    void put(const Plane& plane, std::byte* row, const std::byte* from, std::int64_t from_stride, std::int64_t dim,
             std::int64_t heads, bool stream) const {
        std::int64_t bytes = dim * size_of(plane.dtype);
        if (plane.dim_group >= dim && from_stride == bytes && plane.head_stride == bytes) {
            bytes *= heads;
            heads = 1;
        }
        for (std::int64_t h = 0; h < heads; ++h, row += plane.head_stride, from += from_stride) {
            if (plane.dim_group < dim) scatter(plane, row, from, dim);
            else if (stream) plan_.kernels_.stream_copy(row, from, bytes);
            else std::memcpy(row, from, static_cast<std::size_t>(bytes));
        }
    }

    const Plan& plan_;
    const Call& call_;
    const Pointers& at_;
    bool stream_k_;
    bool stream_v_;
    float* cos_;
    float* sin_;
    const float* row_cos_ = nullptr;
    const float* row_sin_ = nullptr;
    std::int64_t heads_ahead_ = 0;
    const float* q_weight_;
    const float* k_weight_;
    std::byte* stage_;
};

void Plan::run(const Pointers& pointers, int threads) const {
    struct Context {
        const Plan& plan;
        const Pointers& pointers;
        bool stream_k;
        bool stream_v;
    };
    Context context = {*this, pointers, false, false};
    if (stream_) {
        context.stream_k = k_route_ != Route::none && streamable(call_.k_pool, pointers.k_pool, call_.k.dim);
        context.stream_v = v_route_ != Route::none && v_route_ != Route::tiles &&
                           streamable(call_.v_pool, pointers.v_pool, call_.v.dim);
    }
    const auto range = [](void* data, std::int64_t begin, std::int64_t end) {
        const Context& shared = *static_cast<Context*>(data);
        Worker(shared.plan, shared.pointers, shared.stream_k, shared.stream_v).units(begin, end);
    };
    threads = worthwhile_threads(bytes_, threads);
    parallel_for(call_.tokens * parts_, grain(threads), threads, range, &context);
}

}  // namespace ropool::cpu
