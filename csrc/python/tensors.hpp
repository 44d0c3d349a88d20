// The values of a call as they come, and its tensors read through PyTorch's C functions.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ropool::eager {
namespace {

namespace nb = nanobind;

// Tensors, options and the backend of a call, in the order of the op's torch schema; all borrowed.
constexpr std::size_t kMostValues = 32;
using Values = PyObject*[kMostValues];
using Addresses = void*[kMostValues];

// A tensor as the C functions take it: the address of an at::Tensor.
using Handle = const void*;
template <class T>
using Getter = std::int32_t (*)(Handle, T*);  // 0: success

struct Metadata {
    std::int64_t rank;
    const std::int64_t* sizes;
    const std::int64_t* strides;
    std::int32_t dtype, device_type, device_index;
    std::uint64_t keys;  // for the dispatcher: what else the tensor is, such as a negated view
    void* data;
};

// PyTorch's functions, and where in a Python tensor its at::Tensor stands.
class Torch {
public:
    // `functions`: addresses of aoti_torch_NAME by NAME. `samples`: tensors, each with the address of its
    // implementation, which is all that an at::Tensor holds, and the bits of its dispatch keys, which stand there.
    Torch(const nb::dict& functions, const std::vector<nb::tuple>& samples) {
        const auto set = [&](auto& function, const char* name) {
            const auto address = nb::cast<std::uintptr_t>(functions[name]);
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
        };
        set(layout_, "get_layout");
        set(dim_, "get_dim");
        set(sizes_, "get_sizes");
        set(strides_, "get_strides");
        set(dtype_, "get_dtype");
        set(device_type_, "get_device_type");
        set(device_index_, "get_device_index");
        set(data_ptr_, "get_data_ptr");
        set(grad_enabled_, "grad_mode_is_enabled");
        for (const nb::tuple& sample : samples) {
            const auto size = nb::cast<std::size_t>(sample[0].type().attr("__basicsize__"));
            const auto wanted = nb::cast<std::uintptr_t>(sample[1]);
            std::size_t at = 2 * sizeof(void*);
            while (at + sizeof(void*) <= size && word(sample[0].ptr(), at) != wanted) at += sizeof(void*);
            if (at + sizeof(void*) > size || (at_ != 0 && at != at_)) {
                throw nb::value_error("ropool._eager: tensors of an unknown kind");
            }
            at_ = at;
        }
        keys_at_ = keys_place(samples);
    }

    bool grad_enabled() const { return grad_enabled_(); }

    // False: not a tensor with strides, or none with memory of its own.
    bool read(PyObject* tensor, Metadata& found) const {
        const Handle handle = reinterpret_cast<const std::byte*>(tensor) + at_;
        std::int32_t layout = 0;
        found.keys = word(reinterpret_cast<const void*>(word(tensor, at_)), keys_at_);
        return layout_(handle, &layout) == 0 && layout == 0 && dim_(handle, &found.rank) == 0 &&
               sizes_(handle, &found.sizes) == 0 && strides_(handle, &found.strides) == 0 &&
               dtype_(handle, &found.dtype) == 0 && device_type_(handle, &found.device_type) == 0 &&
               device_index_(handle, &found.device_index) == 0 && data_ptr_(handle, &found.data) == 0;
    }

    // Ask for the lines that `read` will read.
    void prefetch(PyObject* tensor) const {
        const auto implementation = reinterpret_cast<const std::byte*>(word(tensor, at_));
        for (int line = 0; line < 4; ++line) __builtin_prefetch(implementation + 64 * line);
    }

private:
    // The first place in an implementation where every sample has its keys. Samples differ in them.
    static std::size_t keys_place(const std::vector<nb::tuple>& samples) {
        for (std::size_t at = sizeof(void*); at + sizeof(std::uint64_t) <= kImplementation; at += 8) {
            bool all = !samples.empty();
            for (const nb::tuple& sample : samples) {
                const auto* implementation = reinterpret_cast<const void*>(nb::cast<std::uintptr_t>(sample[1]));
                all = all && word(implementation, at) == nb::cast<std::uint64_t>(sample[2]);
            }
            if (all) return at;
        }
        throw nb::value_error("ropool._eager: tensors of an unknown kind");
    }

    static std::uint64_t word(const void* object, std::size_t at) {
        std::uint64_t value;
        std::memcpy(&value, static_cast<const std::byte*>(object) + at, sizeof(value));
        return value;
    }

    static constexpr std::size_t kImplementation = 208;  // bytes, the most in any version; the keys come last

    std::size_t at_ = 0, keys_at_ = 0;
    Getter<std::int32_t> layout_, dtype_, device_type_, device_index_;
    Getter<std::int64_t> dim_;
    Getter<const std::int64_t*> sizes_, strides_;
    Getter<void*> data_ptr_;
    bool (*grad_enabled_)();
};

}  // namespace
}  // namespace ropool::eager
