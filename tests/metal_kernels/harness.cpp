// Runs the kernels of rope_pool.metal one thread after the other over the grid that the host code lays out. Of the C++
// library it uses what stands in headers: there is none to link with.

// The standard headers first: the shim makes `thread`, `device` and `constant` vanish.
#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

// Every store is counted in the range that it falls into; one that falls into none is an error.
struct Range {
    std::uintptr_t begin, end;
    std::uint8_t* counts;
};
static std::array<Range, 8> ranges;
static std::size_t range_count = 0;
static long stray = 0;

static void on_store(const void* address, std::size_t bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(address);
    for (std::size_t at = 0; at < range_count; ++at) {
        const Range& range = ranges[at];
        if (begin >= range.begin && begin + bytes <= range.end) {
            for (std::size_t i = 0; range.counts != nullptr && i < bytes; ++i) ++range.counts[begin - range.begin + i];
            return;
        }
    }
    ++stray;
}
#define ROPOOL_ON_STORE(address, bytes) on_store(address, bytes)

#include "rope_pool.metal"

#include "launch.hpp"

using ropool::metal::Grid;
using ropool::metal::Kernel;
using ropool::metal::Shape;

struct Buffers {
    void *q, *k, *v, *positions, *slots, *source, *q_out, *k_out, *k_pool, *v_pool;
};

struct Case {
    std::int32_t kernel, dtype, width, per_thread;  // per_thread 0: what the host would choose
    std::int32_t source, long_positions, long_slots, sloppy;
    std::uint32_t first_token;  // the threads of those before it do not run
};

template <class Body>
static void each_thread(const Grid& grid, Body body, uint first = 0) {
    for (uint z = 0; z < grid.threads[2]; ++z) {
        for (uint y = first; y < grid.threads[1]; ++y) {
            for (uint x = 0; x < grid.threads[0]; ++x) body(uint3{x, y, z});
        }
    }
}

template <class T, int V>
static void run(Kernel kernel, const Grid& grid, const Buffers& b, RopePoolParams& params, uint first) {
    const auto in = [](void* p) { return static_cast<const T*>(p); };
    const auto out = [](void* p) { return static_cast<T*>(p); };
    const auto raw = [](void* p) { return static_cast<const uchar*>(p); };
    each_thread(grid, [&](uint3 at) {
        switch (kernel) {
            case Kernel::rope_q:
                return rope_q<T, V>(in(b.q), raw(b.positions), raw(b.source), out(b.q_out), params, at);
            case Kernel::rope_k_pool:
                return rope_k_pool<T, V>(in(b.k), raw(b.positions), raw(b.slots), raw(b.source), out(b.k_out),
                                         out(b.k_pool), params, at);
            case Kernel::v_to_pool:
                return v_to_pool<T, V>(in(b.v), raw(b.slots), raw(b.positions), out(b.v_pool), params, at);
            case Kernel::kv_to_pool:
                return kv_to_pool<T, V>(in(b.k), in(b.v), raw(b.slots), out(b.k_pool), out(b.v_pool), params, at);
            case Kernel::fused:
                return rope_pool_fused<T, V>(in(b.q), in(b.k), in(b.v), raw(b.positions), raw(b.slots), raw(b.source),
                                             out(b.q_out), out(b.k_out), out(b.k_pool), out(b.v_pool), params, at);
        }
    }, first);
}

template <class T>
static void run_width(int width, Kernel kernel, const Grid& grid, const Buffers& b, RopePoolParams& params, uint first) {
    if (width == 4) run<T, 4>(kernel, grid, b, params, first);
    else if (width == 2) run<T, 2>(kernel, grid, b, params, first);
    else run<T, 1>(kernel, grid, b, params, first);
}

extern "C" {

void watch(void* address, std::int64_t bytes, std::uint8_t* counts) {
    const auto begin = reinterpret_cast<std::uintptr_t>(address);
    ranges[range_count++] = {begin, begin + static_cast<std::uintptr_t>(bytes), counts};
}

long unwatch() {
    range_count = 0;
    return std::exchange(stray, 0);
}

int vector_width(const Shape* shape, std::int64_t multiples) { return ropool::metal::vector_width(*shape, multiples); }

std::int64_t alignment(std::uint64_t base, std::int64_t itemsize, std::int64_t a, std::int64_t b) {
    return ropool::metal::alignment(base, itemsize, {a, b});
}

int heads_per_thread(const Shape* shape, int width) { return ropool::metal::heads_per_thread(*shape, width); }

void grid_of(int kernel, const Shape* shape, int width, int per_thread, std::uint32_t most, std::uint32_t* out) {
    const Grid grid = ropool::metal::grid(static_cast<Kernel>(kernel), *shape, width, per_thread, most);
    for (int i = 0; i < 3; ++i) {
        out[i] = grid.threads[i];
        out[3 + i] = grid.group[i];
    }
}

void run_kernel(const Case* test, const Shape* shape, const Buffers* buffers, RopePoolParams* params) {
    kHeadDim = shape->head_dim;
    kRotaryDim = shape->rotary_dim;
    kHeadsQ = shape->heads_q;
    kHeadsKV = shape->heads_kv;
    kInterleaved = shape->interleaved;
    kSource = test->source;
    kLongPositions = test->long_positions != 0;
    kLongSlots = test->long_slots != 0;
    kHeadsPerThread = test->per_thread != 0 ? test->per_thread : ropool::metal::heads_per_thread(*shape, test->width);
    metal::sloppy = test->sloppy;
    const auto kernel = static_cast<Kernel>(test->kernel);
    const Grid grid = ropool::metal::grid(kernel, *shape, test->width, kHeadsPerThread);
    if (test->dtype == 0) run_width<float>(test->width, kernel, grid, *buffers, *params, test->first_token);
    else if (test->dtype == 1) run_width<half>(test->width, kernel, grid, *buffers, *params, test->first_token);
    else run_width<bfloat>(test->width, kernel, grid, *buffers, *params, test->first_token);
}

// The key of a pipeline with the nine constants in `values`, into `out`.
void pipeline_key(const std::int32_t* values, char* out) {
    struct Text {
        char* end;
        void append(const char* from, std::size_t size) {
            std::memcpy(end, from, size);
            end += size;
        }
    };
    const ropool::metal::Constants constants = {values[0],      values[1], values[2],      values[3],     values[4],
                                                values[5] != 0, values[6], values[7] != 0, values[8] != 0};
    *constants.key(Text{out}).end = '\0';
}

void run_copy(void* from, void* to, std::int64_t bytes, int aligned) {
    const Grid grid = ropool::metal::copy_grid(bytes);
    CopyPoolParams params = {bytes, aligned, 0};
    each_thread(grid, [&](uint3 at) {
        copy_pool(static_cast<const uint4*>(from), static_cast<uint4*>(to), params, at,
                  uint3{grid.threads[0], grid.threads[1], grid.threads[2]});
    });
}
}
