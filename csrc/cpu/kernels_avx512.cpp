#include "vec_avx512.hpp"
//
#include "heads.hpp"
#include "rows.hpp"

namespace ropool::cpu {
const Kernels& kernels_avx512() { return kKernels; }
}  // namespace ropool::cpu
