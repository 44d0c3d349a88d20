// ropool._eager: an eager call from the public function to its kernel, without Python in between.
//
// A `Function` takes the arguments of a public function as they were given. It sorts them, asks whether PyTorch has to
// see the call, reads what decides its launch (options; shapes, strides, dtypes and devices) and looks that up in the
// op's `Launches`. Whatever is unusual, or new, goes to the function's Python definition with the same arguments: that
// is the one place that validates and explains.
//
// Tensors are read through the C functions that PyTorch keeps stable for code compiled ahead of time (aoti_torch_*),
// whose addresses are handed in: no header of PyTorch's is needed, nothing is linked, and reading a tensor takes tens
// of nanoseconds. Only what the limited API of Python 3.12 has is called.


#include <nanobind/nanobind.h>
#include <structmember.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "native.hpp"

namespace nb = nanobind;
using ropool::NativeLaunch;

namespace {

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

    void keep(const nb::tuple& args, const nb::tuple& options, nb::handle backend, nb::object launch) {
        Signature signature;
        Addresses addresses;
        if (!describe_all(args, options, backend, signature, addresses) || look_up(signature) != nullptr) return;
        const NativeLaunch* native = nullptr;
        if (nb::hasattr(launch, "native")) {
            const nb::object capsule = launch.attr("native");
            native = static_cast<const NativeLaunch*>(PyCapsule_GetPointer(capsule.ptr(), ropool::kNativeLaunch));
            if (native == nullptr) throw nb::python_error();
        }
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
    std::vector<std::uint32_t> index_;  // hash -> 1 + place in `kept_`, 0: free; a power of two
};

// The way from the arguments of a public function to a launch.
class Entry {
public:
    // `parameters`: name and place in the order of values, the first `positional` of them positional too. `defaults`:
    // in the order of values, `required` where there is none. PyTorch has to see a call while one of `probes` says yes,
    // or what the dictionary `flags` has by the name `flag`.
    Entry(Launches& launches, const std::vector<nb::tuple>& parameters, std::size_t positional,
          const nb::tuple& defaults, nb::handle required, nb::dict flags, nb::str flag, const nb::tuple& probes)
        : launches_(launches), positional_(positional), flags_(std::move(flags)),
          flag_(std::move(flag)) {
        for (const nb::tuple& parameter : parameters) {
            PyObject* name = parameter[0].ptr();
            Py_INCREF(name);
            PyUnicode_InternInPlace(&name);
            parameters_.push_back({nb::steal(name), nb::cast<std::size_t>(parameter[1])});
        }
        for (std::size_t i = 0; i < parameters_.size(); ++i) {
            std::size_t at = place_of(parameters_[i].name.ptr());
            while (names_[at] != 0) at = (at + 1) % kNames;
            names_[at] = static_cast<std::uint8_t>(i + 1);
        }
        for (const nb::handle value : defaults) {
            const bool given = value.ptr() != required.ptr();
            defaults_.push_back(given ? nb::borrow(value) : nb::object());
        }
        for (const nb::handle probe : probes) probes_.push_back(nb::borrow(probe));
        if (parameters_.size() != launches.values() || defaults_.size() != launches.values()) {
            throw nb::value_error("ropool._eager: the parameters are not those of the op");
        }
    }

    // Null, and no error set: the definition serves this call.
    PyObject* call(PyObject* const* args, std::size_t given, PyObject* names) const {
        Values values;
        if (!sorted(args, given, names, values) || !unseen(values)) return nullptr;
        Signature signature;
        Addresses addresses;
        if (!launches_.describe(values, signature, addresses)) return nullptr;
        const Kept* kept = launches_.look_up(signature);
        return kept == nullptr ? nullptr : launched(*kept, values, addresses);
    }

    // Nanoseconds that each stage of a call takes, over `calls` calls of each: sorting the arguments, asking whether
    // PyTorch has to see the call, reading it, looking it up, and the launch.
    std::vector<double> stages(const nb::tuple& args, const nb::dict& kwargs, int calls) const {
        std::vector<PyObject*> given;
        for (const nb::handle value : args) given.push_back(value.ptr());
        nb::list keywords;
        for (const auto& [name, value] : kwargs) {
            keywords.append(name);
            given.push_back(value.ptr());
        }
        const nb::tuple names(keywords);
        Values values;
        Addresses addresses;
        const Kept* kept = nullptr;
        std::vector<double> found;
        const auto timed = [&](auto stage) {
            const auto start = std::chrono::steady_clock::now();
            for (int i = 0; i < calls; ++i) {
                if (!stage()) throw nb::value_error("ropool._eager: no call that is remembered");
            }
            const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
            found.push_back(took.count() / calls);
        };
        timed([&] { return sorted(given.data(), args.size(), names.ptr(), values); });
        timed([&] { return unseen(values); });
        Signature last;
        timed([&] {
            Signature signature;
            const bool described = launches_.describe(values, signature, addresses);
            last = signature;
            return described;
        });
        timed([&] { return (kept = launches_.look_up(last)) != nullptr; });
        timed([&] {
            PyObject* result = launched(*kept, values, addresses);
            if (result == nullptr) throw nb::python_error();
            Py_DECREF(result);
            return true;
        });
        return found;
    }

private:
    struct Parameter {
        nb::object name;  // interned: a keyword is found by its address
        std::size_t value;
    };

    static std::size_t place_of(PyObject* name) { return reinterpret_cast<std::uintptr_t>(name) / 16 % kNames; }

    // False: these arguments do not make a call. `names`: of those after the first `given`; may be null.
    bool sorted(PyObject* const* args, std::size_t given, PyObject* names, Values& values) const {
        const std::size_t count = defaults_.size();
        if (given > positional_) return false;
        for (std::size_t i = 0; i < count; ++i) values[i] = defaults_[i].ptr();
        for (std::size_t i = 0; i < given; ++i) values[parameters_[i].value] = args[i];
        const Py_ssize_t named = names == nullptr ? 0 : PyTuple_Size(names);
        for (Py_ssize_t i = 0; i < named; ++i) {
            PyObject* name = PyTuple_GetItem(names, i);
            std::size_t place = place_of(name);
            while (names_[place] != 0 && parameters_[names_[place] - 1U].name.ptr() != name) {
                place = (place + 1) % kNames;
            }
            if (names_[place] == 0 || names_[place] <= given) return false;
            values[parameters_[names_[place] - 1U].value] = args[given + static_cast<std::size_t>(i)];
        }
        for (std::size_t i = 0; i < count; ++i) {
            if (values[i] == nullptr) return false;
        }
        // The tensors are read last: by then they are on their way to the cache.
        for (std::size_t i = 0; i < launches_.tensors(); ++i) __builtin_prefetch(values[i]);
        return true;
    }

    // Whether PyTorch need not see the call: plain tensors, outside of any mode.
    bool unseen(const Values& values) const {
        for (std::size_t i = 0; i < launches_.tensors(); ++i) {
            if (values[i] == Py_None) continue;
            if (!launches_.plain(values[i])) return false;
            launches_.torch().prefetch(values[i]);
        }
        if (PyDict_GetItem(flags_.ptr(), flag_.ptr()) != Py_False) return false;
        for (const nb::object& probe : probes_) {
            bool on = false;
            if (!Launches::enabled(probe.ptr(), on)) {
                PyErr_Clear();
                return false;
            }
            if (on) return false;
        }
        return true;
    }

    PyObject* launched(const Kept& kept, const Values& values, const Addresses& addresses) const {
        const NativeLaunch* native = kept.native;
        const nb::object launch = kept.launch;  // another thread may clear the table while this one runs
        if (native != nullptr) {
            const NativeLaunch::Result result = native->run(native->self, addresses);
            if (result == NativeLaunch::failed) return nullptr;
            if (result == NativeLaunch::done) Py_RETURN_NONE;
        }
        PyObject* tensors = PyTuple_New(static_cast<Py_ssize_t>(launches_.tensors()));
        if (tensors == nullptr) return nullptr;
        for (std::size_t i = 0; i < launches_.tensors(); ++i) {
            Py_INCREF(values[i]);
            PyTuple_SetItem(tensors, static_cast<Py_ssize_t>(i), values[i]);
        }
        PyObject* result = PyObject_Vectorcall(launch.ptr(), &tensors, 1, nullptr);
        Py_DECREF(tensors);
        if (result == nullptr) return nullptr;
        Py_DECREF(result);
        Py_RETURN_NONE;
    }

    static constexpr std::size_t kNames = 64;

    Launches& launches_;
    std::size_t positional_;
    nb::dict flags_;
    nb::str flag_;
    std::vector<Parameter> parameters_;
    std::uint8_t names_[kNames] = {};  // by `place_of`: 1 + place in `parameters_`, 0: free
    std::vector<nb::object> defaults_;
    std::vector<nb::object> probes_;
};

// The public function of an op, as a Python object: `Function(definition)`, which is its definition until `connect`.
struct Function {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject* dictionary;
    PyObject* weak_references;
    PyObject* definition;
    const Entry* entry;
    PyObject* owner;  // of the entry
};

PyObject* call_function(PyObject* self, PyObject* const* args, std::size_t given, PyObject* names) {
    const Function* function = reinterpret_cast<Function*>(self);
    if (function->entry != nullptr) {
        PyObject* result = function->entry->call(args, static_cast<std::size_t>(PyVectorcall_NARGS(given)), names);
        if (result != nullptr || PyErr_Occurred() != nullptr) return result;
    }
    return PyObject_Vectorcall(function->definition, args, given, names);
}

PyObject* new_function(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject* definition = nullptr;
    if (PyArg_ParseTuple(args, "O:Function", &definition) == 0) return nullptr;
    auto* self = reinterpret_cast<Function*>(PyType_GenericAlloc(type, 0));
    if (self == nullptr) return nullptr;
    Py_INCREF(definition);
    self->vectorcall = call_function;
    self->definition = definition;
    return reinterpret_cast<PyObject*>(self);
}

// As an attribute of a class it stays what it is.
PyObject* get_function(PyObject* self, PyObject*, PyObject*) {
    Py_INCREF(self);
    return self;
}

// Pickled and copied by name, as functions are.
PyObject* reduce_function(PyObject* self, PyObject*) { return PyObject_GetAttrString(self, "__qualname__"); }

PyObject* connect_function(PyObject* self, PyObject* entry) {
    auto* function = reinterpret_cast<Function*>(self);
    const Entry* found = nullptr;
    if (!nb::try_cast(nb::handle(entry), found)) {
        PyErr_SetString(PyExc_TypeError, "ropool._eager: expected an Entry");
        return nullptr;
    }
    Py_INCREF(entry);
    Py_XDECREF(function->owner);
    function->owner = entry;
    function->entry = found;
    Py_RETURN_NONE;
}

int traverse_function(PyObject* self, visitproc visit, void* arg) {
    auto* function = reinterpret_cast<Function*>(self);
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(function->dictionary);
    Py_VISIT(function->definition);
    Py_VISIT(function->owner);
    return 0;
}

int clear_function(PyObject* self) {
    auto* function = reinterpret_cast<Function*>(self);
    function->entry = nullptr;
    Py_CLEAR(function->dictionary);
    Py_CLEAR(function->owner);
    return 0;
}

void free_function(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (reinterpret_cast<Function*>(self)->weak_references != nullptr) PyObject_ClearWeakRefs(self);
    clear_function(self);
    Py_CLEAR(reinterpret_cast<Function*>(self)->definition);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

PyMemberDef function_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Function, vectorcall), READONLY, nullptr},
    {"__dictoffset__", T_PYSSIZET, offsetof(Function, dictionary), READONLY, nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Function, weak_references), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef function_attributes[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef function_methods[] = {
    {"connect", connect_function, METH_O, nullptr},
    {"__reduce__", reduce_function, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

template <class F>
void* slot(F function) {
    return reinterpret_cast<void*>(function);
}

PyType_Slot function_slots[] = {
    {Py_tp_new, slot(new_function)},
    {Py_tp_call, slot(PyVectorcall_Call)},
    {Py_tp_descr_get, slot(get_function)},
    {Py_tp_traverse, slot(traverse_function)},
    {Py_tp_clear, slot(clear_function)},
    {Py_tp_dealloc, slot(free_function)},
    {Py_tp_members, function_members},
    {Py_tp_getset, function_attributes},
    {Py_tp_methods, function_methods},
    {0, nullptr},
};

PyType_Spec function_spec = {"ropool._eager.Function", sizeof(Function), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, function_slots};

}  // namespace

NB_MODULE(_eager, m) {
    nb::set_leak_warnings(false);  // entries and launches live as long as the process
    nb::class_<Torch>(m, "Torch")
        .def(nb::init<const nb::dict&, const std::vector<nb::tuple>&>(), nb::arg("functions"), nb::arg("samples"));
    nb::class_<Launches>(m, "Launches")
        .def(nb::init<std::size_t, std::size_t, const Torch&, nb::handle, nb::handle>(), nb::arg("tensors"),
             nb::arg("options"), nb::arg("torch"), nb::arg("tensor_type"), nb::arg("parameter_type"))
        .def("find", &Launches::find, nb::arg("args"), nb::arg("options"), nb::arg("backend").none())
        .def("keep", &Launches::keep, nb::arg("args"), nb::arg("options"), nb::arg("backend").none(), nb::arg("launch"))
        .def("clear", &Launches::clear)
        .def("__len__", &Launches::size);
    nb::class_<Entry>(m, "Entry")
        .def(nb::init<Launches&, const std::vector<nb::tuple>&, std::size_t, const nb::tuple&, nb::handle,
                      nb::dict, nb::str, const nb::tuple&>(),
             nb::arg("launches"), nb::arg("parameters"), nb::arg("positional"),
             nb::arg("defaults"), nb::arg("required"), nb::arg("flags"), nb::arg("flag"), nb::arg("probes"),
             nb::keep_alive<1, 2>())
        .def("stages", &Entry::stages, nb::arg("args"), nb::arg("kwargs"), nb::arg("calls"));
    PyObject* function = PyType_FromSpec(&function_spec);
    if (function == nullptr) throw nb::python_error();
    m.attr("Function") = nb::steal(function);
}
