#include "rope_pool.hpp"

#include <cmath>
#include <exception>
#include <limits>
#include <sstream>
#include <stdexcept>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace ropool::metal {
namespace {

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
    std::ostringstream message;
    message << op << ": ";
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

template <class... Parts>
void require(bool ok, const char* op, const Parts&... parts) {
    if (!ok) fail(op, parts...);
}

std::string shape_text(const mx::array& a) {
    std::ostringstream text;
    text << a.shape();
    return text.str();
}

void check_storage(const char* op, const char* name, const mx::array& a, mx::Dtype first) {
    const bool known = a.dtype() == mx::float32 || a.dtype() == mx::float16 || a.dtype() == mx::bfloat16;
    require(known, op, name, " is ", a.dtype(), "; allowed: float32, float16, bfloat16");
    require(a.dtype() == first, op, name, " is ", a.dtype(), ", the first argument is ", first,
            "; they must be of one dtype");
}

void check_heads(const char* op, const char* name, const mx::array& a) {
    require(a.ndim() == 3, op, name, " has shape ", shape_text(a), "; expected [T, heads, D]");
    require(a.shape(1) > 0 && a.shape(2) > 0, op, name, " has shape ", shape_text(a), "; heads and D must be at least 1");
}

void check_index(const char* op, const char* name, const mx::array& a, int tokens) {
    require(a.ndim() == 1 && a.shape(0) == tokens, op, name, " has shape ", shape_text(a), "; expected [", tokens, "]");
    require(a.dtype() == mx::int32 || a.dtype() == mx::int64, op, name, " is ", a.dtype(), "; allowed: int32, int64");
}

void check_pool(const char* op, const char* name, const mx::array& pool, const mx::array& rows) {
    const int rank = static_cast<int>(pool.ndim());
    const bool fits = (rank == 3 || rank == 4) && pool.shape(-2) == rows.shape(1) && pool.shape(-1) == rows.shape(2);
    require(fits, op, name, " has shape ", shape_text(pool), "; expected [S, ", rows.shape(1), ", ", rows.shape(2),
            "] or [P, B, ", rows.shape(1), ", ", rows.shape(2), "]");
    require(pool.dtype() == rows.dtype(), op, name, " is ", pool.dtype(), ", k is ", rows.dtype(),
            "; the pool holds the dtype of the model");
    // The strides of an array are known once it is evaluated.
    if (pool.status() != mx::array::Status::unscheduled) {
        require(pool.flags().row_contiguous, op, name, " must be row-contiguous");
    }
}

void check_store(const char* op, const mx::array& k, const mx::array& v, const mx::array& slots,
                 const mx::array& k_pool, const mx::array& v_pool, mx::Dtype first) {
    check_storage(op, "k", k, first);
    check_storage(op, "v", v, first);
    check_heads(op, "k", k);
    check_heads(op, "v", v);
    require(v.shape() == k.shape(), op, "v has shape ", shape_text(v), ", k has ", shape_text(k),
            "; they must be of one shape");
    check_index(op, "slots", slots, k.shape(0));
    check_pool(op, "k_pool", k_pool, k);
    check_pool(op, "v_pool", v_pool, v);
    require(v_pool.shape() == k_pool.shape(), op, "v_pool has shape ", shape_text(v_pool), ", k_pool has ",
            shape_text(k_pool), "; they must be of one shape");
}

// Double-float frequencies of a base: what float32 rounds off is kept in the second row.
mx::array frequencies_of(double base, int rotary_dim) {
    const int pairs = rotary_dim / 2;
    std::vector<float> values(2 * static_cast<std::size_t>(pairs));
    for (int i = 0; i < pairs; ++i) {
        const double exact = std::pow(base, -2.0 * i / rotary_dim);
        values[i] = static_cast<float>(exact);
        values[pairs + i] = static_cast<float>(exact - values[i]);
    }
    return mx::array(values.data(), {2, pairs}, mx::float32);
}

struct Rotation {
    Options options;
    mx::array source;
};

Rotation read_rotation(const std::optional<mx::array>& inv_freq, const std::optional<mx::array>& cos_sin,
                       std::optional<double> base, std::optional<int> rotary_dim, mx::Dtype storage, int head_dim) {
    const int given = inv_freq.has_value() + cos_sin.has_value() + base.has_value();
    require(given == 1, kFused, given, " of inv_freq, cos_sin and base were given; exactly one is needed");
    Options options;
    mx::array source = mx::array(0.0F);
    if (base) {
        require(std::isfinite(*base) && *base > 1.0, kFused, "base is ", *base, "; allowed: a finite number above 1");
        options.rotary_dim = rotary_dim.value_or(head_dim);
    } else if (inv_freq) {
        const mx::array& f = *inv_freq;
        require(f.dtype() == mx::float32, kFused, "inv_freq is ", f.dtype(), "; allowed: float32");
        const bool fits = f.ndim() == 1 || (f.ndim() == 2 && f.shape(0) == 2);
        require(fits, kFused, "inv_freq has shape ", shape_text(f), "; expected [R/2], or [2, R/2] with the parts that "
                "float32 rounds off");
        options.rotary_dim = 2 * f.shape(-1);
    } else {
        const mx::array& t = *cos_sin;
        require(t.ndim() == 2 && t.shape(0) > 0, kFused, "cos_sin has shape ", shape_text(t),
                "; expected [positions, R]");
        require(t.dtype() == mx::float32 || t.dtype() == storage, kFused, "cos_sin is ", t.dtype(),
                "; allowed: float32, the dtype of q (", storage, ")");
        options.rotary_dim = t.shape(1);
    }
    const int dim = options.rotary_dim;
    require(dim >= 2 && dim % 2 == 0 && dim <= head_dim, kFused, "the rotary dim is ", dim,
            "; allowed: an even number from 2 to D (", head_dim, ")");
    require(!rotary_dim || *rotary_dim == dim, kFused, "rotary_dim is ", rotary_dim.value_or(0),
            ", the frequencies are those of ", dim);
    if (base) {
        options.source = Source::frequencies;
        source = frequencies_of(*base, dim);
    } else if (inv_freq) {
        options.source = Source::frequencies;
        source = inv_freq->ndim() == 2 ? *inv_freq
                                       : mx::concatenate({mx::expand_dims(*inv_freq, 0), mx::zeros({1, dim / 2})}, 0);
        source = mx::contiguous(source);
    } else {
        options.source = cos_sin->dtype() == mx::float32 ? Source::table : Source::model_table;
        source = mx::contiguous(*cos_sin);
    }
    return {options, source};
}

[[noreturn]] void no_transform(const char* name, const char* transform) {
    fail(name, transform, " is not defined for it; it writes into a pool and is for inference");
}

}  // namespace

std::int64_t slots_of(const mx::array& pool) {
    return pool.ndim() == 3 ? pool.shape(0) : static_cast<std::int64_t>(pool.shape(0)) * pool.shape(1);
}

ReleasedSiblings::ReleasedSiblings(const char* op, const std::vector<mx::array>& inputs,
                                   std::vector<mx::array>& outputs, std::size_t pools_at)
    : inputs_(inputs), outputs_(outputs), exceptions_(std::uncaught_exceptions()) {
    for (const std::size_t i : {pools_at, pools_at + 1}) {
        require(inputs[i].flags().row_contiguous, op, i == pools_at ? "k_pool" : "v_pool", " must be row-contiguous");
    }
    for (const mx::array& output : outputs) {
        if (output.is_tracer()) return;
    }
    for (mx::array& output : outputs) {
        if (&output.inputs() != &inputs) output.inputs().clear();
    }
}

ReleasedSiblings::~ReleasedSiblings() {
    if (std::uncaught_exceptions() == exceptions_) return;
    for (mx::array& output : outputs_) {
        if (output.inputs().empty()) output.inputs() = inputs_;
    }
}

bool take_pool(const mx::array& pool, mx::array& out) {
    if (pool.is_donatable()) {
        out.copy_shared_buffer(pool);
        return true;
    }
    out.set_data(mx::allocator::malloc(out.nbytes()));
    return false;
}

std::string module_directory() {
    Dl_info info;
    if (dladdr(reinterpret_cast<const void*>(&module_directory), &info) == 0) return ".";
    const std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/'));
}

Four rope_pool_fused(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& positions,
                     const mx::array& slots, const mx::array& k_pool, const mx::array& v_pool,
                     const std::optional<mx::array>& inv_freq, const std::optional<mx::array>& cos_sin,
                     std::optional<double> base, std::optional<int> rotary_dim, bool interleaved, double factor,
                     bool single_dispatch, mx::StreamOrDevice stream) {
    check_storage(kFused, "q", q, q.dtype());
    check_heads(kFused, "q", q);
    check_store(kFused, k, v, slots, k_pool, v_pool, q.dtype());
    require(k.shape(0) == q.shape(0), kFused, "k has ", k.shape(0), " tokens, q has ", q.shape(0));
    require(k.shape(2) == q.shape(2), kFused, "k has head dim ", k.shape(2), ", q has ", q.shape(2));
    require(q.shape(1) % k.shape(1) == 0, kFused, "q has ", q.shape(1), " heads; allowed: a multiple of the ",
            k.shape(1), " heads of k");
    check_index(kFused, "positions", positions, q.shape(0));
    require(std::abs(factor) <= std::numeric_limits<float>::max(), kFused, "factor is ", factor,
            "; allowed: a finite number of float32");
    auto [options, source] = read_rotation(inv_freq, cos_sin, base, rotary_dim, q.dtype(), q.shape(2));
    options.interleaved = interleaved;
    options.factor = static_cast<float>(factor);
    options.single_dispatch = single_dispatch;
    const auto made = mx::array::make_arrays(
        {q.shape(), k.shape(), k_pool.shape(), v_pool.shape()}, {q.dtype(), k.dtype(), k_pool.dtype(), v_pool.dtype()},
        std::make_shared<RopePoolFused>(mx::to_stream(stream), options),
        {q, k, v, positions, slots, k_pool, v_pool, source});
    return {made[0], made[1], made[2], made[3]};
}

Two store_pool(const mx::array& k, const mx::array& v, const mx::array& slots, const mx::array& k_pool,
               const mx::array& v_pool, mx::StreamOrDevice stream) {
    check_store(kStore, k, v, slots, k_pool, v_pool, k.dtype());
    const auto made = mx::array::make_arrays({k_pool.shape(), v_pool.shape()}, {k_pool.dtype(), v_pool.dtype()},
                                             std::make_shared<StorePool>(mx::to_stream(stream)),
                                             {k, v, slots, k_pool, v_pool});
    return {made[0], made[1]};
}

std::vector<mx::Shape> RopePoolFused::output_shapes(const std::vector<mx::array>& inputs) {
    return {inputs[0].shape(), inputs[1].shape(), inputs[5].shape(), inputs[6].shape()};
}

bool RopePoolFused::is_equivalent(const mx::Primitive& other) const {
    return options_ == static_cast<const RopePoolFused&>(other).options_;
}

std::vector<mx::Shape> StorePool::output_shapes(const std::vector<mx::array>& inputs) {
    return {inputs[3].shape(), inputs[4].shape()};
}

#define ROPOOL_NO_TRANSFORMS(Class, function)                                                                       \
    std::vector<mx::array> Class::jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,                 \
                                      const std::vector<int>&) {                                                    \
        no_transform(function, "jvp");                                                                              \
    }                                                                                                               \
    std::vector<mx::array> Class::vjp(const std::vector<mx::array>&, const std::vector<mx::array>&,                 \
                                      const std::vector<int>&, const std::vector<mx::array>&) {                     \
        no_transform(function, "vjp");                                                                              \
    }                                                                                                               \
    std::pair<std::vector<mx::array>, std::vector<int>> Class::vmap(const std::vector<mx::array>&,                  \
                                                                    const std::vector<int>&) {                      \
        no_transform(function, "vmap");                                                                             \
    }

ROPOOL_NO_TRANSFORMS(RopePoolFused, kFused)
ROPOOL_NO_TRANSFORMS(StorePool, kStore)

}  // namespace ropool::metal
