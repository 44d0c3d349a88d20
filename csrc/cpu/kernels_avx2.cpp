#include "vec_avx2.hpp"
//
#include "heads.hpp"
#include "rows.hpp"

namespace ropool::cpu {
const Kernels& kernels_avx2() { return kKernels; }
}  // namespace ropool::cpu
