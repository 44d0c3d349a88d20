#include "vec_baseline.hpp"
//
#include "heads.hpp"
#include "rows.hpp"

namespace ropool::cpu {
const Kernels& kernels_baseline() { return kKernels; }
}  // namespace ropool::cpu
