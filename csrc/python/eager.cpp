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

#include <chrono>
#include <cstring>

#include "cuda_launch.hpp"
#include "launches.hpp"

namespace ropool::eager {
namespace {

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

// As a function does: an instance of a class that has it gets a method.
PyObject* get_function(PyObject* self, PyObject* instance, PyObject*) {
    if (instance == nullptr || instance == Py_None) {
        Py_INCREF(self);
        return self;
    }
    static PyObject* method = nb::module_::import_("types").attr("MethodType").inc_ref().ptr();
    PyObject* args[] = {self, instance};
    return PyObject_Vectorcall(method, args, 2, nullptr);
}

// What the definition has by the name `name`.
PyObject* get_of_definition(PyObject* self, void* name) {
    return PyObject_GetAttrString(reinterpret_cast<Function*>(self)->definition, static_cast<const char*>(name));
}

PyObject* represent_function(PyObject* self) { return PyObject_Repr(reinterpret_cast<Function*>(self)->definition); }

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

PyGetSetDef of_definition(const char* name) {
    return {name, get_of_definition, nullptr, nullptr, const_cast<char*>(name)};
}

// With these `inspect` takes it for a function where it does not ask for the class. That stays its own: by it
// `torch.compile` knows that there is no frame of Python to look into.
PyGetSetDef function_attributes[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
    of_definition("__code__"),
    of_definition("__defaults__"),
    of_definition("__kwdefaults__"),
    of_definition("__globals__"),
    of_definition("__closure__"),
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
    {Py_tp_repr, slot(represent_function)},
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
}  // namespace ropool::eager

namespace nb = nanobind;
using namespace ropool::eager;

NB_MODULE(_eager, m) {
    nb::set_leak_warnings(false);  // entries and launches live as long as the process
    nb::class_<Torch>(m, "Torch")
        .def(nb::init<const nb::dict&, const std::vector<nb::tuple>&>(), nb::arg("functions"), nb::arg("samples"));
    nb::class_<Launches>(m, "Launches")
        .def(nb::init<std::size_t, std::size_t, const Torch&, nb::handle, nb::handle>(), nb::arg("tensors"),
             nb::arg("options"), nb::arg("torch"), nb::arg("tensor_type"), nb::arg("parameter_type"))
        .def("find", &Launches::find, nb::arg("args"), nb::arg("options"), nb::arg("backend").none())
        .def("epoch", &Launches::epoch)
        .def("keep", &Launches::keep, nb::arg("args"), nb::arg("options"), nb::arg("backend").none(), nb::arg("launch"),
             nb::arg("epoch"))
        .def("clear", &Launches::clear)
        .def("__len__", &Launches::size);
    nb::class_<Entry>(m, "Entry")
        .def(nb::init<Launches&, const std::vector<nb::tuple>&, std::size_t, const nb::tuple&, nb::handle,
                      nb::dict, nb::str, const nb::tuple&>(),
             nb::arg("launches"), nb::arg("parameters"), nb::arg("positional"),
             nb::arg("defaults"), nb::arg("required"), nb::arg("flags"), nb::arg("flag"), nb::arg("probes"),
             nb::keep_alive<1, 2>())
        .def("stages", &Entry::stages, nb::arg("args"), nb::arg("kwargs"), nb::arg("calls"));
    m.def("cuda_launch", &cuda_launch, nb::arg("functions"), nb::arg("kernel"), nb::arg("device"), nb::arg("frame"),
          nb::arg("stream_at"), nb::arg("parameters_at"), nb::arg("operands"));
    m.def("frozen", &frozen, nb::arg("native"), nb::arg("otherwise"));
    PyObject* function = PyType_FromSpec(&function_spec);
    if (function == nullptr) throw nb::python_error();
    m.attr("Function") = nb::steal(function);
}
