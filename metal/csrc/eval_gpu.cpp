// Evaluation on Apple GPUs: chooses the kernels, their constants and their grids, and encodes the dispatches.

#include <stdexcept>

#include "launch.hpp"
#include "rope_pool.hpp"

#ifdef _METAL_

#include <filesystem>
#include <fstream>
#include <sstream>

#include "../kernels/params.h"
#include "mlx/backend/metal/device.h"

namespace ropool::metal {
namespace {

std::string read(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error("ropool_metal: cannot read " + path + "; reinstall ropool-metal");
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// The sources as one string, for a compiler that finds no files.
std::string sources() {
    const std::string folder = module_directory() + "/kernels/";
    std::string text = read(folder + "rope_pool.metal");
    const std::string include = "#include \"params.h\"";
    std::string params = read(folder + "params.h");
    const std::string once = "#pragma once";
    params.replace(params.find(once), once.size(), "");
    text.replace(text.find(include), include.size(), params);
    return text;
}

MTL::Library* library(mx::metal::Device& device) {
    const std::string built = module_directory() + "/ropool_metal.metallib";
    if (std::filesystem::exists(built)) return device.get_library("ropool_metal", built);
    return device.get_library("ropool_metal_sources", sources);
}

const char* type_name(mx::Dtype dtype) {
    if (dtype == mx::float32) return "float32";
    return dtype == mx::float16 ? "float16" : "bfloat16";
}

mx::metal::MTLFCList list_of(const Constants& c) {
    using MTL::DataType;
    return {{&c.head_dim, DataType::DataTypeInt, 0},         {&c.rotary_dim, DataType::DataTypeInt, 1},
            {&c.heads_q, DataType::DataTypeInt, 2},          {&c.heads_kv, DataType::DataTypeInt, 3},
            {&c.heads_per_thread, DataType::DataTypeInt, 4}, {&c.interleaved, DataType::DataTypeBool, 5},
            {&c.source, DataType::DataTypeInt, 6},           {&c.long_positions, DataType::DataTypeBool, 7},
            {&c.long_slots, DataType::DataTypeBool, 8}};
}

RopePoolRows rows_of(const mx::array& a) { return {a.strides(0), a.strides(1), a.strides(2)}; }

std::int64_t alignment_of(const mx::array& a) {
    if (a.strides(2) != 1) return 1;
    return alignment(static_cast<std::uint64_t>(a.offset()), static_cast<std::int64_t>(a.itemsize()),
                     {a.strides(0), a.strides(1)});
}

// What dispatches of one primitive share.
class Encoder {
public:
    Encoder(mx::Stream stream, Shape shape, Constants constants, mx::Dtype dtype, int width)
        : device_(mx::metal::device(stream.device)), encoder_(mx::metal::get_command_encoder(stream)), shape_(shape),
          constants_(constants), suffix_(std::string("_") + type_name(dtype) + "_" + std::to_string(width)),
          width_(width) {}

    mx::metal::CommandEncoder& begin(const char* kernel) {
        const std::string name = kernel + suffix_;
        pipeline_ = device_.get_kernel(name, library(device_), constants_.key(name), list_of(constants_));
        encoder_.set_compute_pipeline_state(pipeline_);
        return encoder_;
    }

    void dispatch(Kernel kernel) {
        const auto most = static_cast<std::uint32_t>(pipeline_->maxTotalThreadsPerThreadgroup());
        const Grid laid = grid(kernel, shape_, width_, constants_.heads_per_thread, most);
        encoder_.dispatch_threads(MTL::Size(laid.threads[0], laid.threads[1], laid.threads[2]),
                                  MTL::Size(laid.group[0], laid.group[1], laid.group[2]));
    }

    // The pool that is written: in place, or in a copy when something else holds it.
    void take(const mx::array& pool, mx::array& out) {
        if (take_pool(pool, out) || out.nbytes() == 0) return;
        const auto bytes = static_cast<std::int64_t>(out.nbytes());
        const CopyPoolParams params = {bytes, (pool.offset() | out.offset()) % 16 == 0, 0};
        encoder_.set_compute_pipeline_state(device_.get_kernel("copy_pool", library(device_)));
        encoder_.set_input_array(pool, 0);
        encoder_.set_output_array(out, 1);
        encoder_.set_bytes(params, 2);
        const Grid laid = copy_grid(bytes);
        encoder_.dispatch_threads(MTL::Size(laid.threads[0], laid.threads[1], 1), MTL::Size(laid.group[0], 1, 1));
    }

private:
    mx::metal::Device& device_;
    mx::metal::CommandEncoder& encoder_;
    Shape shape_;
    Constants constants_;
    std::string suffix_;
    int width_;
    MTL::ComputePipelineState* pipeline_ = nullptr;
};

}  // namespace

void RopePoolFused::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
    const ReleasedSiblings released(kFused, inputs, outputs, 5);
    const mx::array &q = inputs[0], &k = inputs[1], &v = inputs[2];
    const mx::array &positions = inputs[3], &slots = inputs[4], &source = inputs[7];
    const Shape shape = {q.shape(0), q.shape(1), k.shape(1), q.shape(2), options_.rotary_dim, options_.interleaved};
    const std::int64_t pools_at = std::min(alignment(inputs[5].offset(), q.itemsize(), {}),
                                           alignment(inputs[6].offset(), q.itemsize(), {}));
    const std::int64_t multiples = std::min({alignment_of(q), alignment_of(k), alignment_of(v), pools_at,
                                             alignment(0, q.itemsize(), {q.shape(2)})});
    const int width = vector_width(shape, multiples);
    const Constants constants = {shape.head_dim,
                                 shape.rotary_dim,
                                 shape.heads_q,
                                 shape.heads_kv,
                                 heads_per_thread(shape, width),
                                 options_.interleaved,
                                 static_cast<std::int32_t>(options_.source),
                                 positions.dtype() == mx::int64,
                                 slots.dtype() == mx::int64};
    Encoder encoder(stream(), shape, constants, q.dtype(), width);
    for (int i = 0; i < 2; ++i) outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
    encoder.take(inputs[5], outputs[2]);
    encoder.take(inputs[6], outputs[3]);
    if (shape.tokens == 0) return;
    RopePoolParams params = {rows_of(q), rows_of(k), rows_of(v), positions.strides(0), slots.strides(0),
                             slots_of(outputs[2]), source.shape(0), options_.factor, 0};
    if (options_.single_dispatch) {
        auto& e = encoder.begin("rope_pool_fused");
        const mx::array* read[] = {&q, &k, &v, &positions, &slots, &source};
        for (int i = 0; i < 6; ++i) e.set_input_array(*read[i], i);
        for (int i = 0; i < 4; ++i) e.set_output_array(outputs[i], 6 + i);
        e.set_bytes(params, 10);
        encoder.dispatch(Kernel::fused);
        return;
    }
    auto& e = encoder.begin("rope_q");
    e.set_input_array(q, 0);
    e.set_input_array(positions, 1);
    e.set_input_array(source, 2);
    e.set_output_array(outputs[0], 3);
    e.set_bytes(params, 4);
    encoder.dispatch(Kernel::rope_q);
    encoder.begin("rope_k_pool");
    e.set_input_array(k, 0);
    e.set_input_array(positions, 1);
    e.set_input_array(slots, 2);
    e.set_input_array(source, 3);
    e.set_output_array(outputs[1], 4);
    e.set_output_array(outputs[2], 5);
    e.set_bytes(params, 6);
    encoder.dispatch(Kernel::rope_k_pool);
    encoder.begin("v_to_pool");
    e.set_input_array(v, 0);
    e.set_input_array(slots, 1);
    e.set_input_array(positions, 2);
    e.set_output_array(outputs[3], 3);
    e.set_bytes(params, 4);
    encoder.dispatch(Kernel::v_to_pool);
}

void StorePool::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
    const ReleasedSiblings released(kStore, inputs, outputs, 3);
    const mx::array &k = inputs[0], &v = inputs[1], &slots = inputs[2];
    const Shape shape = {k.shape(0), 0, k.shape(1), k.shape(2), 0, false};
    const std::int64_t pools_at = std::min(alignment(inputs[3].offset(), k.itemsize(), {}),
                                           alignment(inputs[4].offset(), k.itemsize(), {}));
    const int width = vector_width(shape, std::min({alignment_of(k), alignment_of(v), pools_at}));
    const Constants constants = {shape.head_dim, 0, 0, shape.heads_kv, heads_per_thread(shape, width),
                                 false, static_cast<std::int32_t>(Source::none), false, slots.dtype() == mx::int64};
    Encoder encoder(stream(), shape, constants, k.dtype(), width);
    encoder.take(inputs[3], outputs[0]);
    encoder.take(inputs[4], outputs[1]);
    if (shape.tokens == 0) return;
    const RopePoolParams params = {{}, rows_of(k), rows_of(v), 0, slots.strides(0), slots_of(outputs[0]), 0, 1.0F, 0};
    auto& e = encoder.begin("kv_to_pool");
    e.set_input_array(k, 0);
    e.set_input_array(v, 1);
    e.set_input_array(slots, 2);
    e.set_output_array(outputs[0], 3);
    e.set_output_array(outputs[1], 4);
    e.set_bytes(params, 5);
    encoder.dispatch(Kernel::kv_to_pool);
}

}  // namespace ropool::metal

#else

namespace ropool::metal {

void RopePoolFused::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
    throw std::runtime_error(std::string(kFused) + ": this build of ropool-metal has no GPU kernels");
}

void StorePool::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
    throw std::runtime_error(std::string(kStore) + ": this build of ropool-metal has no GPU kernels");
}

}  // namespace ropool::metal

#endif
