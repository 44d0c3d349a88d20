// A call made ready: kernels chosen, units of work cut, everything that does not depend on addresses worked out.
#pragma once

#include "kernels.hpp"
#include "pool_rows.hpp"
#include "thread_pool.hpp"

namespace ropool::cpu {

class Plan {
public:
    // Throws std::invalid_argument when the call cannot be expressed by the kernels.
    explicit Plan(Call call);

    // Safe to call from several threads at once. `threads` is the most threads to use.
    void run(const Pointers& pointers, int threads) const;

    // Large enough that threads may be worth their cost, and so may letting go of an interpreter lock.
    bool threaded() const { return bytes_ >= kThreadedBytes; }

private:
    friend class Worker;

    // How the heads of K or V reach the pool.
    enum class Route : std::uint8_t {
        none,    // no pool
        copy,    // stored bytes are the source's bytes (after write-back, if any)
        direct,  // the kernel writes into the pool
        staged,  // the kernel writes into scratch, which is then scattered
        tiles,   // the latent part of the 656-byte row
    };

    // Units of work that one of `threads` takes at once.
    std::int64_t grain(int threads) const;

    // Whether short rows of the pool are written each somewhere else, as when sequences decode together; told by the
    // first two tokens, for it decides about speed alone.
    bool scattered(const Pointers& pointers) const;

    static Route route(const Plane& plane, DType source, std::int64_t dim, bool computed);

    Call call_;
    const Kernels& kernels_;
    HeadsFn q_heads_ = nullptr;
    HeadsFn k_back_ = nullptr;  // K onto itself
    HeadsFn k_store_ = nullptr;
    HeadsFn v_store_ = nullptr;
    TableFn table_ = nullptr;  // null: the cos/sin row is used where it stands
    Route k_route_ = Route::none;
    Route v_route_ = Route::none;
    std::int64_t slots_ = 0;
    RowOffsets k_offsets_;
    RowOffsets v_offsets_;
    std::vector<std::uint32_t> mask1_, mask2_;
    std::int64_t parts_ = 1;  // groups of heads that a token's work is cut into
    std::int64_t bytes_ = 0;  // read and written by a call
    bool stream_ = false;
};

// Bytes of one token's heads.
std::int64_t row_bytes(const Rows& rows);

}  // namespace ropool::cpu
