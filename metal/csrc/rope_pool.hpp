// The primitives of the package and the functions that put them into a graph.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace ropool::metal {

namespace mx = mlx::core;

// Where the sines and cosines come from.
enum class Source : int {
    frequencies = 0,  // [2, R/2] float32: inverse frequencies and what float32 rounded off them
    table = 1,        // [positions, R] float32
    model_table = 2,  // [positions, R] in the storage type
    none = 3,         // no rotation
};

struct Options {
    int rotary_dim = 0;
    bool interleaved = false;
    Source source = Source::none;
    float factor = 1.0F;
    bool single_dispatch = true;

    bool operator==(const Options&) const = default;
};

// Inputs q, k, v, positions, slots, k_pool, v_pool, source; outputs q_rot, k_rot, k_pool, v_pool.
class RopePoolFused : public mx::Primitive {
public:
    RopePoolFused(mx::Stream stream, Options options) : mx::Primitive(stream), options_(options) {}

    void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
    void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
    std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                               const std::vector<int>& argnums) override;
    std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                               const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
    std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                             const std::vector<int>& axes) override;
    std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
    bool is_equivalent(const mx::Primitive& other) const override;
    const char* name() const override { return "RopePoolFused"; }

private:
    Options options_;
};

// Inputs k, v, slots, k_pool, v_pool; outputs k_pool, v_pool.
class StorePool : public mx::Primitive {
public:
    explicit StorePool(mx::Stream stream) : mx::Primitive(stream) {}

    void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
    void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
    std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                               const std::vector<int>& argnums) override;
    std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                               const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
    std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                             const std::vector<int>& axes) override;
    std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
    bool is_equivalent(const mx::Primitive&) const override { return true; }
    const char* name() const override { return "StorePool"; }
};

// The names that errors begin with.
inline constexpr const char* kFused = "ropool_metal.rope_pool_fused";
inline constexpr const char* kStore = "ropool_metal.store_pool";

using Four = std::tuple<mx::array, mx::array, mx::array, mx::array>;
using Two = std::tuple<mx::array, mx::array>;

// Both throw std::invalid_argument for an argument that does not fit; nothing is evaluated.
Four rope_pool_fused(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& positions,
                     const mx::array& slots, const mx::array& k_pool, const mx::array& v_pool,
                     const std::optional<mx::array>& inv_freq, const std::optional<mx::array>& cos_sin,
                     std::optional<double> base, std::optional<int> rotary_dim, bool interleaved, double factor,
                     bool single_dispatch, mx::StreamOrDevice stream);
Two store_pool(const mx::array& k, const mx::array& v, const mx::array& slots, const mx::array& k_pool,
               const mx::array& v_pool, mx::StreamOrDevice stream);

// Slots of a [S, Hk, D] or [P, B, Hk, D] pool.
std::int64_t slots_of(const mx::array& pool);

// Every output of a primitive holds its inputs, which would make each of them look shared. They are let go of anyway
// once the primitive is evaluated; make one of these first thing in that. When the evaluation fails the outputs get
// their inputs back, and can be evaluated again. Arrays of a graph transform keep theirs.
class ReleasedSiblings {
public:
    // The pools are inputs[pools_at] and the one behind it. Throws std::invalid_argument, naming the primitive's `op`,
    // unless both are row-contiguous; nothing is released then.
    ReleasedSiblings(const char* op, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs,
                     std::size_t pools_at);
    ~ReleasedSiblings();
    ReleasedSiblings(const ReleasedSiblings&) = delete;
    ReleasedSiblings& operator=(const ReleasedSiblings&) = delete;

private:
    const std::vector<mx::array>& inputs_;
    std::vector<mx::array>& outputs_;
    const int exceptions_;
};

// The output that starts as `pool` and is written afterwards: its own memory where nothing else uses it. Returns
// false when it is new memory, which the caller fills.
bool take_pool(const mx::array& pool, mx::array& out);

// Where this module stands, which is where its kernels are.
std::string module_directory();

}  // namespace ropool::metal
