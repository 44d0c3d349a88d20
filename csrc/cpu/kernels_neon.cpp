#include "vec_neon.hpp"
//
#include "heads.hpp"
#include "rows.hpp"

namespace ropool::cpu {
const Kernels& kernels_neon() { return kKernels; }
}  // namespace ropool::cpu
