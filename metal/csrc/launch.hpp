// How a call is laid over a grid: pure arithmetic, the same in the product and in the tests that run the kernels on a
// CPU. No Metal and no MLX here.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace ropool::metal {

struct Shape {
    std::int64_t tokens = 0;
    int heads_q = 0;
    int heads_kv = 0;
    int head_dim = 0;
    int rotary_dim = 0;
    bool interleaved = false;
};

enum class Kernel : std::uint8_t { rope_q, rope_k_pool, v_to_pool, kv_to_pool, fused };

struct Grid {
    std::array<std::uint32_t, 3> threads;
    std::array<std::uint32_t, 3> group;
};

// Elements that a thread loads at once. 4 are 8 bytes of a half type and 16 of float32. `multiples`: what the
// addresses of all heads are multiples of, in elements (see alignment below); 1 when dims are not contiguous.
inline int vector_width(const Shape& shape, std::int64_t multiples) {
    for (const int width : {4, 2}) {
        if (shape.rotary_dim / 2 % width == 0 && (shape.head_dim - shape.rotary_dim) % (2 * width) == 0 &&
            multiples % width == 0) {
            return width;
        }
    }
    return 1;
}

// The largest of 1, 2 and 4 that divides every address `base + any multiple of a stride`; strides are elements and
// the base is bytes.
inline std::int64_t alignment(std::uint64_t base, std::int64_t itemsize, std::initializer_list<std::int64_t> strides) {
    for (const std::int64_t width : {4, 2}) {
        const bool fits = base % static_cast<std::uint64_t>(width * itemsize) == 0 &&
                          std::all_of(strides.begin(), strides.end(), [&](std::int64_t s) { return s % width == 0; });
        if (fits) return width;
    }
    return 1;
}

// Heads that share one thread's sines and cosines. Few threads leave the GPU idle, so heads are shared only where
// there is work for all of it: by the number of threads without sharing.
struct SharingRow {
    std::int64_t most_threads;
    int heads;
};
inline constexpr SharingRow kSharing[] = {{1 << 14, 1}, {1 << 16, 2}, {1 << 18, 4}};
inline constexpr int kMostShared = 8;

inline int chunks(const Shape& shape, int width) { return (shape.head_dim + 2 * width - 1) / (2 * width); }

inline int heads_per_thread(const Shape& shape, int width) {
    const int heads = std::max(shape.heads_q, shape.heads_kv);
    const std::int64_t threads = shape.tokens * heads * chunks(shape, width);
    int shared = kMostShared;
    for (const SharingRow& row : kSharing) {
        if (threads <= row.most_threads) {
            shared = row.heads;
            break;
        }
    }
    return std::clamp(shared, 1, std::max(1, heads));
}

inline std::uint32_t groups(int heads, int per_thread) {
    return static_cast<std::uint32_t>((heads + per_thread - 1) / per_thread);
}

// Threads of a group: whole heads side by side, then tokens, then groups of heads, up to `most` (256 leaves room for
// registers; a pipeline may allow fewer).
inline constexpr std::uint32_t kGroupThreads = 256;

inline Grid grid(Kernel kernel, const Shape& shape, int width, int per_thread, std::uint32_t most = kGroupThreads) {
    const auto x = static_cast<std::uint32_t>(chunks(shape, width));
    const auto y = static_cast<std::uint32_t>(shape.tokens);
    const std::uint32_t q = groups(shape.heads_q, per_thread);
    const std::uint32_t kv = groups(shape.heads_kv, per_thread);
    std::uint32_t z = kv;
    if (kernel == Kernel::rope_q) z = q;
    if (kernel == Kernel::fused) z = q + kv;
    Grid result = {{x, y, z}, {1, 1, 1}};
    std::uint32_t room = std::max<std::uint32_t>(1, std::min(most, kGroupThreads));
    for (std::size_t i = 0; i < 3; ++i) {
        result.group[i] = std::clamp<std::uint32_t>(result.threads[i], 1, room);
        room /= result.group[i];
    }
    return result;
}

// The function constants of rope_pool.metal, in their order.
struct Constants {
    std::int32_t head_dim, rotary_dim, heads_q, heads_kv, heads_per_thread;
    bool interleaved;
    std::int32_t source;
    bool long_positions, long_slots;

    // Every constant stands in the key, exactly: pipelines are cached by it. `Text` is std::string in the product; the
    // tests use one of their own, which needs no library.
    template <class Text>
    Text key(Text text) const {
        for (const std::int64_t value :
             {std::int64_t{head_dim}, std::int64_t{rotary_dim}, std::int64_t{heads_q}, std::int64_t{heads_kv},
              std::int64_t{heads_per_thread}, std::int64_t{interleaved}, std::int64_t{source},
              std::int64_t{long_positions}, std::int64_t{long_slots}}) {
            std::array<char, 24> digits;
            digits[0] = '_';
            const char* end = std::to_chars(digits.data() + 1, digits.data() + digits.size(), value).ptr;
            text.append(digits.data(), static_cast<std::size_t>(end - digits.data()));
        }
        return text;
    }
};

// The grid of copy_pool: 16 bytes a thread, in rows that keep every dimension small.
inline Grid copy_grid(std::int64_t bytes) {
    constexpr std::int64_t kRow = 1 << 16;
    const std::int64_t threads = (bytes + 15) / 16;
    const std::int64_t x = std::clamp<std::int64_t>(threads, 1, kRow);
    const std::int64_t y = std::max<std::int64_t>(1, (threads + x - 1) / x);
    return {{static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(y), 1},
            {static_cast<std::uint32_t>(std::min<std::int64_t>(x, kGroupThreads)), 1, 1}};
}

}  // namespace ropool::metal
