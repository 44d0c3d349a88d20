// ropool._signature: the metadata of a call's tensors as one string of bytes, which is what an eager call looks its
// launch up by. Reading it attribute by attribute costs more than everything else in a call together.
//
// Tensors are read through DLPack's C exchange API, a table of functions that PyTorch publishes on its tensor type
// since 2.10; no header and no library of PyTorch's is needed, and its layout is fixed for a major version (DLPack 1).

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>

namespace nb = nanobind;

namespace {

struct DLTensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t ndim;
    std::uint8_t type_code, type_bits;
    std::uint16_t type_lanes;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct ExchangeApi {
    std::uint32_t major, minor;
    ExchangeApi* previous;
    void* allocate;
    void* export_owned;
    void* import_owned;
    int (*describe)(void* object, DLTensor* out);
    void* current_stream;
};

class Reader {
public:
    Reader(nb::handle tensor_type, nb::handle capsule) : type_(nb::borrow(tensor_type)), capsule_(nb::borrow(capsule)) {
        api_ = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (api_ == nullptr) throw nb::python_error();
        while (api_ != nullptr && api_->major != 1) api_ = api_->previous;
        if (api_ == nullptr || api_->describe == nullptr) throw nb::value_error("no exchange API of DLPack 1");
    }

    nb::bytes read(const nb::tuple& args) const {
        char buffer[kBytes];
        std::size_t used = 0;
        const Py_ssize_t count = PyTuple_Size(args.ptr());
        for (Py_ssize_t i = 0; i < count; ++i) {
            PyObject* object = PyTuple_GetItem(args.ptr(), i);
            if (object == Py_None) {
                append(buffer, used, "", 1);
                continue;
            }
            const bool tensor = Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(type_.ptr()) ||
                                PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(type_.ptr())) != 0;
            if (!tensor) throw nb::type_error("not a tensor");
            DLTensor t;
            if (api_->describe(object, &t) != 0) throw nb::python_error();
            // The rank stands first, so that no two lists of tensors give the same bytes.
            const Head head = {static_cast<std::int8_t>(t.ndim + 1), t.type_code, t.type_bits,
                               static_cast<std::int8_t>(t.device_type), t.device_id};
            append(buffer, used, &head, sizeof(head));
            append(buffer, used, t.shape, sizeof(std::int64_t) * static_cast<std::size_t>(t.ndim));
            append(buffer, used, t.strides, sizeof(std::int64_t) * static_cast<std::size_t>(t.ndim));
        }
        return nb::bytes(buffer, used);
    }

private:
    struct Head {
        std::int8_t rank;
        std::uint8_t type_code, type_bits;
        std::int8_t device_type;
        std::int32_t device_id;
    };
    static constexpr std::size_t kBytes = 4096;

    static void append(char* buffer, std::size_t& used, const void* data, std::size_t size) {
        if (used + size > kBytes) throw nb::value_error("too many dimensions");
        std::memcpy(buffer + used, data, size);
        used += size;
    }

    nb::object type_;
    nb::object capsule_;  // owns the table
    ExchangeApi* api_;
};

}  // namespace

NB_MODULE(_signature, m) {
    nb::set_leak_warnings(false);  // the reader lives as long as the process
    nb::class_<Reader>(m, "Reader")
        .def(nb::init<nb::handle, nb::handle>(), nb::arg("tensor_type"), nb::arg("capsule"))
        .def("read", &Reader::read, nb::arg("args"));
}
