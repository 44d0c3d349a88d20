// ropool._cpu: the Python face of the cpu kernels. It knows neither torch's headers nor its ABI: a tensor is any
// object with a data_ptr() method, or its address that ropool._eager has read. Only what the limited API of Python 3.12 has is called.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "../cpu/isa.hpp"
#include "../cpu/plan.hpp"
#include "../cpu/thread_pool.hpp"
#include "native.hpp"

namespace nb = nanobind;
using namespace ropool::cpu;

namespace {

DType dtype_from(const std::string& name) {
    if (name == "float32") return DType::f32;
    if (name == "float16") return DType::f16;
    if (name == "bfloat16") return DType::bf16;
    if (name == "float8_e4m3fn") return DType::e4m3;
    if (name == "float8_e5m2") return DType::e5m2;
    throw std::invalid_argument("ropool._cpu: dtype " + name + " is not one of float32, float16, bfloat16, "
                                "float8_e4m3fn, float8_e5m2");
}

IntType int_type_from(const std::string& name) {
    if (name == "int32") return IntType::i32;
    if (name == "int64") return IntType::i64;
    throw std::invalid_argument("ropool._cpu: index dtype " + name + " is not one of int32, int64");
}

// The members of Pointers by name. Written-to and read-only members differ in constness only.
std::byte** pointer_named(Pointers& pointers, const std::string& name) {
    const auto mutable_member = [](const std::byte*& member) { return const_cast<std::byte**>(&member); };
    if (name == "q") return &pointers.q;
    if (name == "k") return &pointers.k;
    if (name == "v") return mutable_member(pointers.v);
    if (name == "q_out") return &pointers.q_out;
    if (name == "k_pool") return &pointers.k_pool;
    if (name == "v_pool") return &pointers.v_pool;
    if (name == "table") return mutable_member(pointers.table);
    if (name == "positions") return mutable_member(pointers.positions);
    if (name == "offsets") return mutable_member(pointers.offsets);
    if (name == "slots") return mutable_member(pointers.slots);
    if (name == "window") return mutable_member(pointers.window);
    if (name == "q_norm") return mutable_member(pointers.q_norm);
    if (name == "k_norm") return mutable_member(pointers.k_norm);
    if (name == "q_scale") return mutable_member(pointers.q_scale);
    if (name == "k_scale") return mutable_member(pointers.k_scale);
    if (name == "v_scale") return mutable_member(pointers.v_scale);
    throw std::invalid_argument("ropool._cpu: no operand named " + name);
}

// A plan, and where in the arguments of an op its addresses are.
class Launch {
public:
    // `operands`: (index in the argument tuple, member of Pointers, bytes added to the address). `threads`: asked in
    // each call that is worth threads, for how many.
    Launch(const Call& call, const std::vector<nb::tuple>& operands, nb::object threads)
        : plan_(call), threads_(std::move(threads)), data_ptr_(nb::steal(PyUnicode_InternFromString("data_ptr"))) {
        Pointers layout;
        for (const nb::tuple& operand : operands) {
            std::byte** member = pointer_named(layout, nb::cast<std::string>(operand[1]));
            const auto at = reinterpret_cast<std::byte*>(member) - reinterpret_cast<std::byte*>(&layout);
            operands_.push_back({nb::cast<Py_ssize_t>(operand[0]), static_cast<std::size_t>(at),
                                 nb::cast<std::int64_t>(operand[2]), nb::cast<std::string>(operand[1])});
        }
    }

    Launch(const Launch&) = delete;
    Launch& operator=(const Launch&) = delete;

    // On a tuple of tensors.
    void call(const nb::tuple& args) const {
        if (start(found(args)) != ropool::NativeLaunch::done) throw nb::python_error();
    }

    // The addresses in a tuple of tensors.
    Pointers found(const nb::tuple& args) const {
        Pointers pointers;
        for (const Operand& operand : operands_) {
            if (operand.index >= PyTuple_Size(args.ptr())) throw nb::index_error("ropool._cpu: too few arguments");
            PyObject* tensor = PyTuple_GetItem(args.ptr(), operand.index);
            PyObject* address = PyObject_VectorcallMethod(data_ptr_.ptr(), &tensor, 1, nullptr);
            if (address == nullptr) throw nb::python_error();
            const unsigned long long value = PyLong_AsUnsignedLongLong(address);
            Py_DECREF(address);
            if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) throw nb::python_error();
            if (value == 0) {
                throw std::runtime_error("ropool: " + operand.name + " has no memory: its storage was freed");
            }
            operand.set(pointers, reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(value)));
        }
        return pointers;
    }

    ropool::NativeLaunch::Result start(const Pointers& pointers) const {
        if (!plan_.threaded()) {
            plan_.run(pointers, 1);
            return ropool::NativeLaunch::done;
        }
        PyObject* answer = PyObject_CallNoArgs(threads_.ptr());
        if (answer == nullptr) return ropool::NativeLaunch::failed;
        const long threads = PyLong_AsLong(answer);
        Py_DECREF(answer);
        if (threads == -1 && PyErr_Occurred() != nullptr) return ropool::NativeLaunch::failed;
        PyThreadState* state = PyEval_SaveThread();
        plan_.run(pointers, static_cast<int>(threads));
        PyEval_RestoreThread(state);
        return ropool::NativeLaunch::done;
    }

    const ropool::NativeLaunch* native() const { return &native_; }

private:
    struct Operand {
        Py_ssize_t index;
        std::size_t member;
        std::int64_t offset;
        std::string name;

        void set(Pointers& pointers, std::byte* address) const {
            *reinterpret_cast<std::byte**>(reinterpret_cast<std::byte*>(&pointers) + member) = address + offset;
        }
    };

    static ropool::NativeLaunch::Result run_native(const void* self, void* const* addresses) {
        const Launch& launch = *static_cast<const Launch*>(self);
        Pointers pointers;
        for (const Operand& operand : launch.operands_) {
            void* address = addresses[operand.index];
            if (address == nullptr) return ropool::NativeLaunch::refused;
            operand.set(pointers, static_cast<std::byte*>(address));
        }
        return launch.start(pointers);
    }

    Plan plan_;
    nb::object threads_;
    nb::object data_ptr_;
    std::vector<Operand> operands_;
    ropool::NativeLaunch native_ = {run_native, this};
};

// A launch with its addresses.
struct Frozen {
    nb::object launch;
    Pointers pointers;
};

PyObject* call_frozen(PyObject* self, PyObject*) {
    const Frozen* frozen = nb::inst_ptr<Frozen>(self);
    const nb::object launch = frozen->launch;
    if (nb::inst_ptr<Launch>(launch)->start(frozen->pointers) != ropool::NativeLaunch::done) return nullptr;
    Py_RETURN_NONE;
}

PyMethodDef frozen_definition = {"launch", call_frozen, METH_NOARGS, nullptr};

}  // namespace

NB_MODULE(_cpu, m) {
    install_fork_handler();
    nb::set_leak_warnings(false);  // launches that are remembered live as long as the process

    nb::class_<Rows>(m, "Rows").def(
        "__init__",
        [](Rows* self, const std::string& dtype, std::int64_t heads, std::int64_t dim, std::int64_t token_stride,
           std::int64_t head_stride) {
            new (self) Rows{dtype_from(dtype), heads, dim, token_stride, head_stride};
        },
        nb::arg("dtype"), nb::arg("heads"), nb::arg("dim"), nb::arg("token_stride"), nb::arg("head_stride"));

    nb::class_<Indices>(m, "Indices")
        .def(
            "__init__",
            [](Indices* self, const std::string& dtype, std::int64_t size, std::int64_t stride,
               std::int64_t stream_stride) {
                new (self) Indices{int_type_from(dtype), size, stride, stream_stride};
            },
            nb::arg("dtype"), nb::arg("size"), nb::arg("stride"), nb::arg("stream_stride") = 0);

    nb::class_<Plane>(m, "Plane")
        .def(
            "__init__",
            [](Plane* self, const std::string& dtype, std::int64_t pages, std::int64_t page_size,
               std::int64_t row_group, std::int64_t dim_group, std::int64_t page_stride, std::int64_t head_stride,
               std::int64_t row_group_stride, std::int64_t row_stride, std::int64_t dim_group_stride,
               std::int64_t dim_stride) {
                new (self) Plane{dtype_from(dtype), pages,       page_size,        row_group,
                                 dim_group,         page_stride, head_stride,      row_group_stride,
                                 row_stride,        dim_group_stride, dim_stride};
            },
            nb::arg("dtype"), nb::arg("pages"), nb::arg("page_size"), nb::arg("row_group"), nb::arg("dim_group"),
            nb::arg("page_stride"), nb::arg("head_stride"), nb::arg("row_group_stride"), nb::arg("row_stride"),
            nb::arg("dim_group_stride"), nb::arg("dim_stride"));

    nb::class_<Scales>(m, "Scales").def(
        "__init__",
        [](Scales* self, bool present, std::int64_t stride) {
            new (self) Scales{present, stride};
        },
        nb::arg("present"), nb::arg("stride") = 0);

    nb::class_<Rotary>(m, "Rotary")
        .def(
            "__init__",
            [](Rotary* self, std::int64_t rotary_dim, bool interleaved, const std::string& table_dtype,
               std::int64_t max_position, std::int64_t row_stride, const Indices& positions, const Indices* offsets,
               const std::vector<std::uint8_t>& streams) {
                new (self) Rotary{rotary_dim, interleaved, dtype_from(table_dtype),
                                  max_position, row_stride, positions,
                                  offsets == nullptr ? Indices() : *offsets, streams};
            },
            nb::arg("rotary_dim"), nb::arg("interleaved"), nb::arg("table_dtype"), nb::arg("max_position"),
            nb::arg("row_stride"), nb::arg("positions"), nb::arg("offsets").none(),
            nb::arg("streams"));

    nb::class_<Call>(m, "Call")
        .def(nb::init<>())
        .def_rw("tokens", &Call::tokens)
        .def_rw("q", &Call::q)
        .def_rw("k", &Call::k)
        .def_rw("v", &Call::v)
        .def_rw("q_out", &Call::q_out)
        .def_rw("rotary", &Call::rotary)
        .def_rw("norm_eps", &Call::norm_eps)
        .def_rw("k_pool", &Call::k_pool)
        .def_rw("v_pool", &Call::v_pool)
        .def_rw("v_tiles", &Call::v_tiles)
        .def_rw("tile_scales", &Call::tile_scales)
        .def_rw("slots", &Call::slots)
        .def_rw("window", &Call::window)
        .def_rw("padding_slot", &Call::padding_slot)
        .def_rw("q_scale", &Call::q_scale)
        .def_rw("k_scale", &Call::k_scale)
        .def_rw("v_scale", &Call::v_scale)
        .def_rw("write_k", &Call::write_k)
        .def("set_q_norm", [](Call& call, const std::string& dtype) { call.q_norm = dtype_from(dtype); })
        .def("set_k_norm", [](Call& call, const std::string& dtype) { call.k_norm = dtype_from(dtype); });

    nb::class_<Frozen>(m, "Frozen");
    nb::class_<Launch>(m, "Launch")
        .def(nb::init<const Call&, const std::vector<nb::tuple>&, nb::object>(), nb::arg("call"), nb::arg("operands"),
             nb::arg("threads"))
        .def("__call__", &Launch::call, nb::arg("args"))
        .def("freeze",
             [](nb::handle self, const nb::tuple& args) {
                 const nb::object frozen = nb::cast(Frozen{nb::borrow(self), nb::inst_ptr<Launch>(self)->found(args)});
                 PyObject* function = PyCFunction_NewEx(&frozen_definition, frozen.ptr(), nullptr);
                 if (function == nullptr) throw nb::python_error();
                 return nb::steal(function);
             },
             nb::arg("args"))
        .def_prop_ro("native", [](const Launch& self) {
            PyObject* capsule =
                PyCapsule_New(const_cast<ropool::NativeLaunch*>(self.native()), ropool::kNativeLaunch, nullptr);
            if (capsule == nullptr) throw nb::python_error();
            return nb::steal(capsule);
        });

    m.def("isa", [] {
        const IsaReport& report = isa_report();
        nb::dict result;
        result["compiled"] = report.compiled;
        result["available"] = report.available;
        result["chosen"] = report.chosen;
        return result;
    });
}
