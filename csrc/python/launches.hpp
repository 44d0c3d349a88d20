// The launches that an op remembers, by what decides them.
#pragma once

#include "native.hpp"
#include "tensors.hpp"

namespace ropool::eager {
namespace {

// Everything that a launch is looked up by, as words. Each value starts with its kind or rank, so that no two lists of
// values give the same words.
class Signature {
public:
    bool add(std::uint64_t word) {
        if (used_ == kWords) return false;
        words_[used_++] = word;
        return true;
    }

    // Padded with zeros to whole words. False: there is no room, and the call is not looked up.
    bool add(const void* data, std::size_t size) {
        const std::size_t words = (size + 7) / 8;
        if (used_ + words > kWords) return false;
        if (words > 0) words_[used_ + words - 1] = 0;
        std::memcpy(words_ + used_, data, size);
        used_ += words;
        return true;
    }

    // None, bools, ints, floats, strings, and tuples or lists of these; by value, so that it does not matter which
    // object brings it. False: anything else.
    bool add_option(PyObject* value) {
        enum Kind : std::uint64_t { none, no, yes, integer, real, text, sequence };
        if (value == Py_None) return add(none);
        if (value == Py_False) return add(no);
        if (value == Py_True) return add(yes);
        if (PyUnicode_Check(value)) {
            Py_ssize_t size = 0;
            const char* bytes = PyUnicode_AsUTF8AndSize(value, &size);
            if (bytes == nullptr) return false;
            return add(text | static_cast<std::uint64_t>(size) << 8) && add(bytes, static_cast<std::size_t>(size));
        }
        if (Py_TYPE(value) == &PyLong_Type) {
            int overflow = 0;
            const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
            return overflow == 0 && add(integer) && add(static_cast<std::uint64_t>(number));
        }
        if (Py_TYPE(value) == &PyFloat_Type) {
            const double number = PyFloat_AsDouble(value);
            return add(real) && add(&number, sizeof(number));
        }
        const bool tuple = Py_TYPE(value) == &PyTuple_Type;
        if (!tuple && Py_TYPE(value) != &PyList_Type) return false;
        const Py_ssize_t size = tuple ? PyTuple_Size(value) : PyList_Size(value);
        if (!add(sequence | static_cast<std::uint64_t>(size) << 8)) return false;
        for (Py_ssize_t i = 0; i < size; ++i) {
            PyObject* part = tuple ? PyTuple_GetItem(value, i) : PyList_GetItem(value, i);
            if (Py_TYPE(part) != &PyLong_Type || !add_option(part)) return false;
        }
        return true;
    }

    bool add_tensor(const Metadata& tensor) {
        const auto rank = static_cast<std::size_t>(tensor.rank);
        if (used_ + 2 * rank + 2 > kWords) return false;
        std::uint64_t* next = words_ + used_;
        *next++ = (rank + 1) | static_cast<std::uint64_t>(tensor.dtype & 0xFF) << 16 |
                  static_cast<std::uint64_t>(tensor.device_type & 0xFF) << 24 |
                  static_cast<std::uint64_t>(static_cast<std::uint32_t>(tensor.device_index)) << 32;
        *next++ = tensor.keys;
        for (std::size_t i = 0; i < rank; ++i) {
            next[i] = static_cast<std::uint64_t>(tensor.sizes[i]);
            next[rank + i] = static_cast<std::uint64_t>(tensor.strides[i]);
        }
        used_ += 2 * rank + 2;
        return true;
    }

    std::uint64_t hash() const {
        std::uint64_t first = used_, second = 0;
        for (std::size_t i = 0; i + 1 < used_; i += 2) {
            first = mixed(first ^ words_[i]);
            second = mixed(second ^ words_[i + 1]);
        }
        if (used_ % 2 == 1) first = mixed(first ^ words_[used_ - 1]);
        return mixed(first ^ (second >> 7 | second << 57));
    }

    bool operator==(const std::vector<std::uint64_t>& kept) const {
        return kept.size() == used_ && std::memcmp(kept.data(), words_, 8 * used_) == 0;
    }

    std::vector<std::uint64_t> words() const { return {words_, words_ + used_}; }

private:
    static std::uint64_t mixed(std::uint64_t x) {
        x *= 0x9E3779B97F4A7C15ULL;
        return x ^ x >> 29;
    }

    static constexpr std::size_t kWords = 512;
    std::uint64_t words_[kWords];
    std::size_t used_ = 0;
};

struct Kept {
    std::uint64_t hash;
    std::vector<std::uint64_t> words;
    nb::object launch;
    const NativeLaunch* native;  // null: the launch is called as a Python object
};

// The launches that are remembered of one op.
class Launches {
public:
    Launches(std::size_t tensors, std::size_t options, const Torch& torch, nb::handle tensor_type,
             nb::handle parameter_type)
        : tensors_(tensors), values_(tensors + options + 1), torch_(torch), tensor_type_(nb::borrow(tensor_type)),
          parameter_type_(nb::borrow(parameter_type)), requires_grad_(nb::steal(PyUnicode_InternFromString("requires_grad"))) {
        if (values_ > kMostValues) throw nb::value_error("ropool._eager: too many arguments");
        clear();
    }

    std::size_t tensors() const { return tensors_; }
    std::size_t values() const { return values_; }
    std::size_t size() const { return kept_.size(); }
    const Torch& torch() const { return torch_; }

    bool plain(PyObject* tensor) const {
        return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == tensor_type_.ptr() ||
               reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == parameter_type_.ptr();
    }

    // False: a value is not what a launch can be looked up by, or a tensor needs a gradient. No error is set.
    bool describe(const Values& values, Signature& signature, Addresses& addresses) const {
        for (std::size_t i = tensors_; i < values_; ++i) {
            if (!signature.add_option(values[i])) return failed();
        }
        const bool grad = torch_.grad_enabled();
        for (std::size_t i = 0; i < tensors_; ++i) {
            PyObject* object = values[i];
            addresses[i] = nullptr;
            if (object == Py_None) {
                signature.add(0);
                continue;
            }
            if (!plain(object) &&
                PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(tensor_type_.ptr())) == 0) {
                return false;
            }
            if (grad) {
                PyObject* needed = PyObject_GetAttr(object, requires_grad_.ptr());
                Py_XDECREF(needed);
                if (needed != Py_False) return failed();
            }
            Metadata tensor;
            if (!torch_.read(object, tensor) || !signature.add_tensor(tensor)) return false;
            addresses[i] = tensor.data;
        }
        return true;
    }

    const Kept* look_up(const Signature& signature) const {
        const std::uint64_t hash = signature.hash();
        for (std::size_t at = hash & mask(); index_[at] != 0; at = (at + 1) & mask()) {
            const Kept& kept = kept_[index_[at] - 1];
            if (kept.hash == hash && signature == kept.words) return &kept;
        }
        return nullptr;
    }

    nb::object find(const nb::tuple& args, const nb::tuple& options, nb::handle backend) const {
        Signature signature;
        Addresses addresses;
        if (!describe_all(args, options, backend, signature, addresses)) return nb::none();
        const Kept* kept = look_up(signature);
        return kept == nullptr ? nb::none() : kept->launch;
    }

    // How often all launches were forgotten.
    std::uint64_t epoch() const { return epoch_; }

    // Not where all launches were forgotten after `epoch`, while this one was bound.
    void keep(const nb::tuple& args, const nb::tuple& options, nb::handle backend, nb::object launch,
              std::uint64_t epoch) {
        Signature signature;
        Addresses addresses;
        if (!describe_all(args, options, backend, signature, addresses)) return;
        const NativeLaunch* native = nullptr;
        if (nb::hasattr(launch, "native")) {
            const nb::object capsule = launch.attr("native");
            native = static_cast<const NativeLaunch*>(PyCapsule_GetPointer(capsule.ptr(), ropool::kNativeLaunch));
            if (native == nullptr) throw nb::python_error();
        }
        if (epoch != epoch_ || look_up(signature) != nullptr) return;
        kept_.push_back({signature.hash(), signature.words(), std::move(launch), native});
        if (2 * kept_.size() > index_.size()) {
            index_.assign(2 * index_.size(), 0);
            for (std::size_t i = 0; i < kept_.size(); ++i) enter(i);
        } else {
            enter(kept_.size() - 1);
        }
    }

    void clear() {
        std::vector<Kept> dropped;  // lives until the table is whole again: letting go of a launch may run Python code
        dropped.swap(kept_);
        ++epoch_;
        index_.assign(64, 0);
    }

    // Call `probe`, which says whether something is enabled. False: it raised.
    static bool enabled(PyObject* probe, bool& on) {
        PyObject* answer = PyObject_CallNoArgs(probe);
        if (answer == nullptr) return false;
        on = answer != Py_False && answer != Py_None && PyObject_IsTrue(answer) != 0;
        Py_DECREF(answer);
        return true;
    }

private:
    static bool failed() {
        PyErr_Clear();
        return false;
    }

    bool describe_all(const nb::tuple& args, const nb::tuple& options, nb::handle backend, Signature& signature,
                      Addresses& addresses) const {
        Values values;
        if (args.size() != tensors_ || options.size() + tensors_ + 1 != values_) return false;
        for (std::size_t i = 0; i < tensors_; ++i) values[i] = PyTuple_GetItem(args.ptr(), static_cast<Py_ssize_t>(i));
        for (std::size_t i = tensors_; i + 1 < values_; ++i) {
            values[i] = PyTuple_GetItem(options.ptr(), static_cast<Py_ssize_t>(i - tensors_));
        }
        values[values_ - 1] = backend.ptr();
        return describe(values, signature, addresses);
    }

    std::size_t mask() const { return index_.size() - 1; }

    void enter(std::size_t which) {
        std::size_t at = kept_[which].hash & mask();
        while (index_[at] != 0) at = (at + 1) & mask();
        index_[at] = static_cast<std::uint32_t>(which + 1);
    }

    std::size_t tensors_, values_;
    Torch torch_;
    nb::object tensor_type_, parameter_type_, requires_grad_;
    std::vector<Kept> kept_;
    std::uint64_t epoch_ = 0;
    std::vector<std::uint32_t> index_;  // hash -> 1 + place in `kept_`, 0: free; a power of two
};

}  // namespace
}  // namespace ropool::eager
