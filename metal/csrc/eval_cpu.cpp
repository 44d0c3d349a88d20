// Evaluation on the CPU by the C++ core of ropool's cpu backend. It runs in a task of MLX's stream; the arrays'
// memory outlives it, their descriptors may not, so addresses are taken beforehand.

#include <climits>
#include <cmath>
#include <cstring>
#include <memory>

#include "cpu/plan.hpp"
#include "cpu/thread_pool.hpp"
#include "mlx/backend/cpu/encoder.h"
#include "rope_pool.hpp"

namespace ropool::metal {
namespace {

using namespace ropool::cpu;

DType storage_of(mx::Dtype dtype) {
    if (dtype == mx::float32) return DType::f32;
    return dtype == mx::float16 ? DType::f16 : DType::bf16;
}

Indices indices_of(const mx::array& a) {
    const auto size = static_cast<std::int64_t>(a.itemsize());
    return {a.dtype() == mx::int64 ? IntType::i64 : IntType::i32, a.shape(0), a.strides(0) * size, 0};
}

// A [T, heads, D] input as it stands in memory.
struct Input {
    const std::byte* data;
    std::int64_t tokens, heads, dim, itemsize;
    std::int64_t token_stride, head_stride, dim_stride;  // bytes

    explicit Input(const mx::array& a)
        : data(a.data<std::byte>()), tokens(a.shape(0)), heads(a.shape(1)), dim(a.shape(2)),
          itemsize(static_cast<std::int64_t>(a.itemsize())), token_stride(a.strides(0) * itemsize),
          head_stride(a.strides(1) * itemsize), dim_stride(a.strides(2) * itemsize) {}

    bool contiguous_dims() const { return dim_stride == itemsize || dim == 1; }

    void copy_token(std::int64_t t, std::byte* to) const {
        const std::byte* token = data + t * token_stride;
        for (std::int64_t h = 0; h < heads; ++h, to += dim * itemsize) {
            const std::byte* from = token + h * head_stride;
            if (contiguous_dims()) {
                std::memcpy(to, from, static_cast<std::size_t>(dim * itemsize));
                continue;
            }
            for (std::int64_t d = 0; d < dim; ++d) {
                std::memcpy(to + d * itemsize, from + d * dim_stride, static_cast<std::size_t>(itemsize));
            }
        }
    }

    void copy(std::byte* to) const {
        for (std::int64_t t = 0; t < tokens; ++t) copy_token(t, to + t * heads * dim * itemsize);
    }

    // The rows where they stand, or a copy of them in `space` when their dims are not contiguous.
    Rows rows(DType dtype, std::vector<std::byte>& space, const std::byte*& at) const {
        at = data;
        if (contiguous_dims()) return {dtype, heads, dim, token_stride, head_stride};
        space.resize(static_cast<std::size_t>(tokens * heads * dim * itemsize));
        copy(space.data());
        at = space.data();
        return packed(dtype);
    }

    Rows packed(DType dtype) const { return {dtype, heads, dim, heads * dim * itemsize, dim * itemsize}; }
};

Plane plane_of(const mx::array& pool, DType dtype) {
    const auto size = static_cast<std::int64_t>(pool.itemsize());
    const std::int64_t heads = pool.shape(-2);
    const std::int64_t dim = pool.shape(-1);
    return {dtype, slots_of(pool), 1, 1, dim, heads * dim * size, dim * size, 0, 0, 0, size};
}

std::int64_t index_at(const Indices& indices, const std::byte* base, std::int64_t at) {
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

// The pools of a call: where they are read from when they are not written in place, and where they are written.
struct Pools {
    const std::byte* from[2];
    std::byte* to[2];
    std::size_t bytes;

    Pools(const mx::array& k, const mx::array& v, mx::array& k_out, mx::array& v_out) : bytes(k_out.nbytes()) {
        from[0] = take_pool(k, k_out) ? nullptr : k.data<std::byte>();
        from[1] = take_pool(v, v_out) ? nullptr : v.data<std::byte>();
        to[0] = k_out.data<std::byte>();
        to[1] = v_out.data<std::byte>();
    }

    void copy() const {
        for (int i = 0; i < 2; ++i) {
            if (from[i] != nullptr) std::memcpy(to[i], from[i], bytes);
        }
    }
};

void run(Call&& call, const Pointers& pointers) { Plan(std::move(call)).run(pointers, INT_MAX); }

// From here on the call reads row order[t] of `table` for token t.
void use_token_table(Call& call, Pointers& pointers, const std::vector<float>& table,
                     const std::vector<std::int32_t>& order) {
    call.rotary.table_dtype = DType::f32;
    call.rotary.max_position = call.tokens;
    call.rotary.row_stride = call.rotary.rotary_dim * 4;
    call.rotary.positions = {IntType::i32, call.tokens, 4, 0};
    pointers.table = reinterpret_cast<const std::byte*>(table.data());
    pointers.positions = reinterpret_cast<const std::byte*>(order.data());
}

// cos/sin of the tokens themselves as a table whose rows they read in order.
void token_table(Call& call, Pointers& pointers, const Indices& positions, const std::byte* at,
                 const float* frequencies, float factor, std::vector<float>& table,
                 std::vector<std::int32_t>& order) {
    const std::int64_t dim = call.rotary.rotary_dim;
    const std::int64_t pairs = dim / 2;
    table.resize(static_cast<std::size_t>(call.tokens * dim));
    order.resize(static_cast<std::size_t>(call.tokens));
    for (std::int64_t t = 0; t < call.tokens; ++t) {
        const auto position = static_cast<double>(index_at(positions, at, t));
        for (std::int64_t i = 0; i < pairs; ++i) {
            const double angle = position * (static_cast<double>(frequencies[i]) + frequencies[pairs + i]);
            table[t * dim + i] = static_cast<float>(std::cos(angle) * factor);
            table[t * dim + pairs + i] = static_cast<float>(std::sin(angle) * factor);
        }
        order[t] = static_cast<std::int32_t>(t);
    }
    use_token_table(call, pointers, table, order);
}

// A table times `factor`; the core knows none. Only the rows that the tokens name are read.
void scaled_table(Call& call, Pointers& pointers, float factor, std::vector<float>& table,
                  std::vector<std::int32_t>& order) {
    const Rotary& rotary = call.rotary;
    const std::int64_t dim = rotary.rotary_dim;
    table.resize(static_cast<std::size_t>(call.tokens * dim));
    order.assign(static_cast<std::size_t>(call.tokens), -1);
    for (std::int64_t t = 0; t < call.tokens; ++t) {
        const std::int64_t position = index_at(rotary.positions, pointers.positions, t);
        if (position < 0 || position >= rotary.max_position) continue;
        const std::byte* row = pointers.table + position * rotary.row_stride;
        for (std::int64_t i = 0; i < dim; ++i) {
            float value;
            if (rotary.table_dtype == DType::f32) {
                std::memcpy(&value, row + 4 * i, 4);
            } else if (rotary.table_dtype == DType::f16) {
                mx::float16_t half;
                std::memcpy(&half, row + 2 * i, 2);
                value = static_cast<float>(half);
            } else {
                mx::bfloat16_t half;
                std::memcpy(&half, row + 2 * i, 2);
                value = static_cast<float>(half);
            }
            table[t * dim + i] = value * factor;
        }
        order[t] = static_cast<std::int32_t>(t);
    }
    use_token_table(call, pointers, table, order);
}

}  // namespace

void RopePoolFused::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
    const ReleasedSiblings released(kFused, inputs, outputs, 5);
    const mx::array& positions = inputs[3];
    const mx::array& slots = inputs[4];
    const mx::array& source = inputs[7];
    const Pools pools(inputs[5], inputs[6], outputs[2], outputs[3]);
    for (int i = 0; i < 2; ++i) outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));

    const DType dtype = storage_of(inputs[0].dtype());
    Call call;
    call.tokens = inputs[0].shape(0);
    call.rotary.rotary_dim = options_.rotary_dim;
    call.rotary.interleaved = options_.interleaved;
    call.rotary.positions = indices_of(positions);
    if (options_.source != Source::frequencies) {
        call.rotary.table_dtype = storage_of(source.dtype());
        call.rotary.max_position = source.shape(0);
        call.rotary.row_stride = options_.rotary_dim * static_cast<std::int64_t>(source.itemsize());
    }
    call.k_pool = plane_of(outputs[2], dtype);
    call.v_pool = plane_of(outputs[3], dtype);
    call.slots = indices_of(slots);
    call.write_k = true;

    Pointers pointers;
    pointers.q_out = outputs[0].data<std::byte>();
    pointers.k = outputs[1].data<std::byte>();
    pointers.k_pool = pools.to[0];
    pointers.v_pool = pools.to[1];
    pointers.positions = positions.data<std::byte>();
    pointers.slots = slots.data<std::byte>();
    pointers.table = source.data<std::byte>();

    auto work = [call, pointers, pools, dtype, q = Input(inputs[0]), k = Input(inputs[1]), v = Input(inputs[2]),
                 options = options_]() mutable {
        pools.copy();
        if (call.tokens == 0) return;
        std::vector<std::byte> q_space, v_space;
        std::vector<float> table;
        std::vector<std::int32_t> order;
        const std::byte* at = nullptr;
        call.q = q.rows(dtype, q_space, at);
        pointers.q = const_cast<std::byte*>(at);
        call.v = v.rows(dtype, v_space, pointers.v);
        call.q_out = q.packed(dtype);
        call.k = k.packed(dtype);
        k.copy(pointers.k);
        if (options.source == Source::frequencies) {
            const auto* frequencies = reinterpret_cast<const float*>(pointers.table);
            token_table(call, pointers, call.rotary.positions, pointers.positions, frequencies, options.factor, table,
                        order);
        } else {
            // A token whose position the table does not hold keeps its Q as it was.
            for (std::int64_t t = 0; t < call.tokens; ++t) {
                const std::int64_t position = index_at(call.rotary.positions, pointers.positions, t);
                if (position >= 0 && position < call.rotary.max_position) continue;
                q.copy_token(t, pointers.q_out + t * call.q_out.token_stride);
            }
            if (options.factor != 1.0F) scaled_table(call, pointers, options.factor, table, order);
        }
        run(std::move(call), pointers);
    };
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const mx::array& input : inputs) encoder.set_input_array(input);
    for (mx::array& output : outputs) encoder.set_output_array(output);
    encoder.dispatch(std::move(work));
}

void StorePool::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
    const ReleasedSiblings released(kStore, inputs, outputs, 3);
    const Pools pools(inputs[3], inputs[4], outputs[0], outputs[1]);
    const DType dtype = storage_of(inputs[0].dtype());
    Call call;
    call.tokens = inputs[0].shape(0);
    call.k_pool = plane_of(outputs[0], dtype);
    call.v_pool = plane_of(outputs[1], dtype);
    call.slots = indices_of(inputs[2]);
    Pointers pointers;
    pointers.slots = inputs[2].data<std::byte>();
    pointers.k_pool = pools.to[0];
    pointers.v_pool = pools.to[1];
    auto work = [call, pointers, pools, dtype, k = Input(inputs[0]), v = Input(inputs[1])]() mutable {
        pools.copy();
        if (call.tokens == 0) return;
        std::vector<std::byte> k_space, v_space;
        const std::byte* at = nullptr;
        call.k = k.rows(dtype, k_space, at);
        pointers.k = const_cast<std::byte*>(at);
        call.v = v.rows(dtype, v_space, pointers.v);
        run(std::move(call), pointers);
    };
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const mx::array& input : inputs) encoder.set_input_array(input);
    for (mx::array& output : outputs) encoder.set_output_array(output);
    encoder.dispatch(std::move(work));
}

}  // namespace ropool::metal
