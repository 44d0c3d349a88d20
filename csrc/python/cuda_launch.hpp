// A launch through the CUDA driver. Nothing of CUDA is included or linked: functions come as addresses, and kernel,
// launch configuration and parameters as what the cuda backend has made of them.
#pragma once

#include <memory>

#include "native.hpp"
#include "tensors.hpp"

namespace ropool::eager {
namespace {

class CudaLaunch : public NativeLaunch {
public:
    // `functions`: addresses of the driver's cuLaunchKernelEx and cuCtxGetDevice and of PyTorch's
    // aoti_torch_get_current_cuda_stream, by these names. `frame`: a CUlaunchConfig, its stream `stream_at` bytes in
    // and its attributes elsewhere, and from `parameters_at` on the kernel's parameters, addresses first. `operands`:
    // for each address, which of the op's tensors has it, and the bits of it that have to be 0.
    CudaLaunch(const nb::dict& functions, std::uintptr_t kernel, int device, const nb::bytes& frame,
               std::size_t stream_at, std::size_t parameters_at, const std::vector<nb::tuple>& operands)
        : NativeLaunch{run, this}, kernel_(reinterpret_cast<void*>(kernel)), device_(device), size_(frame.size()),
          stream_at_(stream_at), parameters_at_(parameters_at) {
        const auto set = [&](auto& function, const char* name) {
            const auto address = nb::cast<std::uintptr_t>(functions[name]);
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
        };
        set(launch_, "cuLaunchKernelEx");
        set(current_device_, "cuCtxGetDevice");
        set(current_stream_, "aoti_torch_get_current_cuda_stream");
        if (size_ > kMostBytes || stream_at + sizeof(void*) > parameters_at ||
            parameters_at + operands.size() * sizeof(void*) > size_) {
            throw nb::value_error("ropool._eager: a frame that does not hold its launch");
        }
        std::memcpy(frame_, frame.c_str(), size_);
        for (const nb::tuple& operand : operands) {
            operands_.push_back({nb::cast<std::size_t>(operand[0]), nb::cast<std::uintptr_t>(operand[1])});
        }
    }

    CudaLaunch(const CudaLaunch&) = delete;
    CudaLaunch& operator=(const CudaLaunch&) = delete;

private:
    struct Operand {
        std::size_t tensor;
        std::uintptr_t zeros;
    };

    static Result run(const void* self, void* const* addresses) {
        return static_cast<const CudaLaunch*>(self)->start(addresses);
    }

    // Refused: an address is less aligned than the kernel takes it to be, the device is not the current one, or the
    // driver says no, which it does before anything has begun.
    Result start(void* const* addresses) const {
        alignas(void*) std::byte frame[kMostBytes];
        std::memcpy(frame, frame_, size_);
        std::byte* next = frame + parameters_at_;
        for (const Operand& operand : operands_) {
            const void* address = addresses[operand.tensor];
            if ((reinterpret_cast<std::uintptr_t>(address) & operand.zeros) != 0) return refused;
            std::memcpy(next, &address, sizeof(address));
            next += sizeof(address);
        }
        int device = 0;
        if (current_device_(&device) != 0 || device != device_) return refused;
        if (current_stream_(device_, reinterpret_cast<void**>(frame + stream_at_)) != 0) return refused;
        void* parameters[] = {frame + parameters_at_};
        PyThreadState* state = PyEval_SaveThread();  // the driver waits while its queue is full
        const int status = launch_(frame, kernel_, parameters, nullptr);
        PyEval_RestoreThread(state);
        return status == 0 ? done : refused;
    }

    static constexpr std::size_t kMostBytes = 512;

    int (*launch_)(const void* configuration, void* kernel, void** parameters, void** extra);
    int (*current_device_)(int* device);
    std::int32_t (*current_stream_)(std::int32_t device, void** stream);
    void* kernel_;
    int device_;
    std::size_t size_, stream_at_, parameters_at_;
    std::vector<Operand> operands_;
    alignas(void*) std::byte frame_[kMostBytes];
};

nb::capsule cuda_launch(const nb::dict& functions, std::uintptr_t kernel, int device, const nb::bytes& frame,
                        std::size_t stream_at, std::size_t parameters_at, const std::vector<nb::tuple>& operands) {
    auto made = std::make_unique<CudaLaunch>(functions, kernel, device, frame, stream_at, parameters_at, operands);
    const NativeLaunch* native = made.release();
    return {native, kNativeLaunch, [](void* owned) noexcept {
                delete static_cast<CudaLaunch*>(static_cast<NativeLaunch*>(owned));
            }};
}

// Of a launch with all of its addresses, and what is called where it is refused.
PyObject* call_frozen(PyObject* self, PyObject*) {
    const void* found = PyCapsule_GetPointer(PyTuple_GetItem(self, 0), kNativeLaunch);
    if (found == nullptr) return nullptr;
    const auto* native = static_cast<const NativeLaunch*>(found);
    const NativeLaunch::Result result = native->run(native->self, nullptr);
    if (result == NativeLaunch::refused) return PyObject_CallNoArgs(PyTuple_GetItem(self, 1));
    if (result == NativeLaunch::failed) return nullptr;
    Py_RETURN_NONE;
}

PyMethodDef frozen_definition = {"launch", call_frozen, METH_NOARGS, nullptr};

nb::object frozen(const nb::capsule& native, nb::handle otherwise) {
    PyObject* function = PyCFunction_NewEx(&frozen_definition, nb::make_tuple(native, otherwise).ptr(), nullptr);
    if (function == nullptr) throw nb::python_error();
    return nb::steal(function);
}

}  // namespace
}  // namespace ropool::eager
