// ropool_metal._ext: the Python face of the primitives.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>

#include "cpu/thread_pool.hpp"
#include "rope_pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_ext, m) {
    ropool::cpu::install_fork_handler();
    ropool::cpu::use_own_threads();  // MLX evaluates on threads of its own
    m.attr("mlx_version") = ROPOOL_MLX_VERSION;
#ifdef _METAL_
    m.attr("has_gpu_kernels") = true;
#else
    m.attr("has_gpu_kernels") = false;
#endif
    m.def("rope_pool_fused", &ropool::metal::rope_pool_fused, "q"_a, "k"_a, "v"_a, "positions"_a, "slots"_a, "k_pool"_a,
          "v_pool"_a, nb::kw_only(), "inv_freq"_a = nb::none(), "cos_sin"_a = nb::none(), "base"_a = nb::none(),
          "rotary_dim"_a = nb::none(), "interleaved"_a = false, "factor"_a = 1.0, "single_dispatch"_a = true,
          "stream"_a = nb::none());
    m.def("store_pool", &ropool::metal::store_pool, "k"_a, "v"_a, "slots"_a, "k_pool"_a, "v_pool"_a, nb::kw_only(),
          "stream"_a = nb::none());
}
