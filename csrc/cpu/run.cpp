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
constexpr std::int64_t kHeadsAhead = 2048;
constexpr std::int64_t kCopyAhead = 2048;
// Up to so many threads leave memory bandwidth over, and wait for lines instead: then stores past the caches pay only
// where the machine's own look-ahead would ask for lines behind a row that nobody needs. More were not measured; there
// they save a third of the traffic to the pool.
constexpr int kFewThreads = 2;
constexpr std::int64_t kMemoryPage = 4096;  // where that look-ahead ends

template <bool write>
void prefetch(const std::byte* p, std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, write);
}

// The lines of one token's heads: where the heads are contiguous they are one run, otherwise each head is.
struct Lines {
    std::int64_t runs = 0;
    std::int64_t stride = 0;
    std::int64_t bytes = 0;

    Lines(std::int64_t heads, std::int64_t head_stride, std::int64_t head_bytes)
        : runs(heads), stride(head_stride), bytes(head_bytes) {
        if (stride != bytes) return;
        bytes *= runs;
        runs = std::min<std::int64_t>(runs, 1);
    }

    template <bool write>
    void ask(const std::byte* row) const {
        for (std::int64_t i = 0; i < runs; ++i) prefetch<write>(row + i * stride, bytes);
    }
};

Lines source_lines(const Rows& rows) { return {rows.heads, rows.head_stride, rows.dim * size_of(rows.dtype)}; }

// Of a streamed row only the pages are asked for.
Lines pool_lines(const Plane& plane, const Rows& rows, bool stream) {
    if (plane.dtype == DType::none || plane.dim_group < rows.dim) return {0, 0, 0};
    Lines lines = {rows.heads, plane.head_stride, rows.dim * size_of(plane.dtype)};
    if (stream) lines.bytes = 1;
    return lines;
}

}  // namespace

// One thread's view of a call.
class Worker {
public:
    Worker(const Plan& plan, const Pointers& pointers, bool stream_k, bool stream_v)
        : plan_(plan), call_(plan.call_), at_(pointers), stream_k_(stream_k), stream_v_(stream_v),
          q_lines_(source_lines(call_.q)), k_lines_(source_lines(call_.k)), v_lines_(source_lines(call_.v)),
          k_pool_lines_(pool_lines(call_.k_pool, call_.k, stream_k)),
          v_pool_lines_(pool_lines(call_.v_pool, call_.v, stream_v)) {
        const std::int64_t rotary = call_.rotary.rotary_dim;
        const std::int64_t staged = std::max(call_.k.heads * call_.k.dim, call_.v.heads * call_.v.dim);
        float* memory = scratch(2 * rotary + call_.q.dim + call_.k.dim + staged);
        cos_ = memory;
        sin_ = memory + rotary;
        float* const weights = memory + 2 * rotary;
        q_ = job(call_.q, call_.q_scale, rotary);
        k_ = job(call_.k, call_.k_scale, rotary);
        v_ = job(call_.v, call_.v_scale, 0);
        q_.weight = weight(call_.q_norm, at_.q_norm, weights, call_.q.dim);
        k_.weight = weight(call_.k_norm, at_.k_norm, weights + call_.q.dim, call_.k.dim);
        stage_ = reinterpret_cast<std::byte*>(weights + call_.q.dim + call_.k.dim);
        // K and V that no heads kernel reads are asked for here.
        if (plan_.k_route_ == Plan::Route::copy && plan_.k_back_ == nullptr) k_ahead_ = copy_ahead(call_.k);
        if (plan_.v_route_ != Plan::Route::none) v_ahead_ = copy_ahead(call_.v);
    }

    void units(std::int64_t begin, std::int64_t end) {
        const std::int64_t ahead = stream_k_ ? 2 * kAhead : kAhead;
        const std::int64_t last = (end - 1) / plan_.parts_;
        std::int64_t t = begin / plan_.parts_;
        std::int64_t part = begin % plan_.parts_;
        announce_first(t);
        for (std::int64_t next = t + 1; next < t + ahead && next <= last; ++next) announce(next);
        for (std::int64_t unit = begin; unit < end; ++unit) {
            if (part == 0) {
                if (t + ahead <= last) announce(t + ahead);
                if (k_ahead_ > 0 && t + k_ahead_ <= last) k_lines_.ask<false>(row(at_.k, call_.k, t + k_ahead_));
                if (v_ahead_ > 0 && t + v_ahead_ <= last) v_lines_.ask<false>(row(at_.v, call_.v, t + v_ahead_));
                q_.ahead = k_.ahead = v_.ahead = t < last ? kHeadsAhead : 0;
            }
            token(t, part);
            if (++part == plan_.parts_) {
                part = 0;
                ++t;
            }
        }
        if (stream_k_ || stream_v_) plan_.kernels_.stream_fence();
    }

private:
    struct HeadRange {
        std::int64_t first;
        std::int64_t count;
    };

    template <class Byte>
    static Byte* row(Byte* base, const Rows& rows, std::int64_t t) {
        return base + t * rows.token_stride;
    }

    static std::int64_t copy_ahead(const Rows& rows) {
        return std::max<std::int64_t>(1, kCopyAhead / std::max<std::int64_t>(1, row_bytes(rows)));
    }

    // What is the same for every token.
    Heads job(const Rows& rows, const Scales& scales, std::int64_t rotary_dim) const {
        Heads heads = {};
        heads.src_stride = rows.head_stride;
        heads.dim = rows.dim;
        heads.rotary_dim = rotary_dim;
        heads.eps = call_.norm_eps;
        heads.scale_stride = scales.stride;
        return heads;
    }

    const float* weight(DType dtype, const std::byte* src, float* space, std::int64_t dim) const {
        if (dtype == DType::none) return nullptr;
        plan_.kernels_.widen(dtype, src, space, dim);
        return space;
    }

    HeadRange share(std::int64_t heads, std::int64_t part) const {
        if (plan_.parts_ == 1) return {0, heads};
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
        q_lines_.ask<false>(row(at_.q, call_.q, t));
        announce(t);
        k_lines_.ask<false>(row(at_.k, call_.k, t));
        v_lines_.ask<false>(row(at_.v, call_.v, t));
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
        k_pool_lines_.ask<true>(at_.k_pool + plan_.k_offsets_.of(slot));
        v_pool_lines_.ask<true>(at_.v_pool + plan_.v_offsets_.of(slot));
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
        TableRow row;
        for (int s = 0; s < streams; ++s) {
            row.rows[s] = table_row(t, s);
            if (row.rows[s] == nullptr) return false;
        }
        const float* cos = cos_;
        const float* sin = sin_;
        if (plan_.table_ == nullptr) {
            cos = reinterpret_cast<const float*>(row.rows[0]);
            sin = cos + rotary.rotary_dim / 2;
        } else {
            row.mask1 = streams == 1 ? nullptr : plan_.mask1_.data();
            row.mask2 = plan_.mask2_.data();
            row.half = rotary.rotary_dim / 2;
            row.cos = cos_;
            row.sin = sin_;
            plan_.table_(row);
        }
        q_.cos = k_.cos = cos;
        q_.sin = k_.sin = sin;
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

    static void with_scale(Heads& heads, const Scales& scales, const std::byte* base, HeadRange range) {
        if (scales.present) heads.scale = base + range.first * scales.stride;
    }

    void move_q(std::int64_t t, HeadRange range) {
        const bool in_place = call_.q_out.dtype == DType::none;
        const Rows& out = in_place ? call_.q : call_.q_out;
        q_.src = row(at_.q, call_.q, t) + range.first * call_.q.head_stride;
        q_.dst = row(in_place ? at_.q : at_.q_out, out, t) + range.first * out.head_stride;
        q_.dst_stride = out.head_stride;
        q_.heads = range.count;
        with_scale(q_, call_.q_scale, at_.q_scale, range);
        plan_.q_heads_(q_);
    }

    // K is read for the pool before it is overwritten, unless the pool takes a copy of what is written back.
    void move_k(std::int64_t t, std::int64_t slot, HeadRange range) {
        std::byte* const src = row(at_.k, call_.k, t) + range.first * call_.k.head_stride;
        k_.src = src;
        k_.heads = range.count;
        std::byte* const pool_row = slot < 0 ? nullptr : at_.k_pool + plan_.k_offsets_.of(slot);
        const bool copies = plan_.k_route_ == Plan::Route::copy;
        if (pool_row != nullptr && !copies) {
            with_scale(k_, call_.k_scale, at_.k_scale, range);
            store(plan_.k_route_, plan_.k_store_, k_, call_.k_pool, pool_row, range, stream_k_);
        }
        if (plan_.k_back_ != nullptr) {
            k_.dst = src;
            k_.dst_stride = k_.src_stride;
            k_.scale = nullptr;
            plan_.k_back_(k_);
        }
        if (pool_row != nullptr && copies) {
            store(plan_.k_route_, nullptr, k_, call_.k_pool, pool_row, range, stream_k_);
        }
    }

    void move_v(std::int64_t t, std::int64_t slot, HeadRange range) {
        v_.src = row(at_.v, call_.v, t) + range.first * call_.v.head_stride;
        v_.heads = range.count;
        std::byte* const pool_row = at_.v_pool + plan_.v_offsets_.of(slot);
        if (plan_.v_route_ == Plan::Route::tiles) {
            if (range.count == 0) return;
            plan_.kernels_.tiles(call_.v.dtype, v_.src, pool_row, pool_row + call_.tile_scales, call_.v.dim);
            return;
        }
        with_scale(v_, call_.v_scale, at_.v_scale, range);
        store(plan_.v_route_, plan_.v_store_, v_, call_.v_pool, pool_row, range, stream_v_);
    }

    void store(Plan::Route route, HeadsFn fn, Heads& heads, const Plane& plane, std::byte* pool_row, HeadRange range,
               bool stream) {
        pool_row += range.first * plane.head_stride;
        const std::byte* from = heads.src;
        std::int64_t from_stride = heads.src_stride;
        if (route != Plan::Route::copy) {
            const bool direct = route == Plan::Route::direct && !stream;
            heads.dst = direct ? pool_row : stage_;
            heads.dst_stride = direct ? plane.head_stride : heads.dim * size_of(plane.dtype);
            fn(heads);
            if (direct) return;
            from = stage_;
            from_stride = heads.dst_stride;
        }
        put(plane, pool_row, from, from_stride, heads.dim, range.count, stream);
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
    const bool stream_k_;
    const bool stream_v_;
    const Lines q_lines_;
    const Lines k_lines_;
    const Lines v_lines_;
    const Lines k_pool_lines_;
    const Lines v_pool_lines_;
    std::int64_t k_ahead_ = 0;  // tokens; 0: not asked for
    std::int64_t v_ahead_ = 0;
    float* cos_;
    float* sin_;
    Heads q_;
    Heads k_;
    Heads v_;
    std::byte* stage_;
};

bool Plan::scattered(const Pointers& pointers) const {
    if (call_.v.heads * call_.v.dim * size_of(call_.v_pool.dtype) >= kMemoryPage) return false;
    // Unsigned: an entry that is no slot may be the largest number.
    const auto entry = [&](std::int64_t t) {
        return static_cast<std::uint64_t>(read_index(call_.slots, pointers.slots, t));
    };
    return call_.tokens < 2 || entry(1) != entry(0) + 1;
}

void Plan::run(const Pointers& pointers, int threads) const {
    struct Context {
        const Plan& plan;
        const Pointers& pointers;
        bool stream_k;
        bool stream_v;
    };
    Context context = {*this, pointers, false, false};
    threads = worthwhile_threads(bytes_, threads);
    if (stream_ && (threads > kFewThreads || scattered(pointers))) {
        context.stream_k = k_route_ != Route::none && streamable(call_.k_pool, pointers.k_pool, call_.k.dim);
        context.stream_v = v_route_ != Route::none && v_route_ != Route::tiles &&
                           streamable(call_.v_pool, pointers.v_pool, call_.v.dim);
    }
    const auto range = [](void* data, std::int64_t begin, std::int64_t end) {
        const Context& shared = *static_cast<Context*>(data);
        Worker(shared.plan, shared.pointers, shared.stream_k, shared.stream_v).units(begin, end);
    };
    parallel_for(call_.tokens * parts_, grain(threads), threads, range, &context);
}

}  // namespace ropool::cpu
