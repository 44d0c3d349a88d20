// Which instruction set the kernels use: compiled in, present on this machine, chosen. Chosen once, at load.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace ropool::cpu {

struct IsaReport {
    std::vector<std::string> compiled;
    std::vector<std::string> available;  // compiled and present on this machine, best last
    std::string chosen;
};

// Picks the best available instruction set, or the one that ROPOOL_CPU_ISA names. Throws std::invalid_argument, with
// what can be chosen, when that one is unknown or not available.
const IsaReport& isa_report();
const Kernels& kernels();

}  // namespace ropool::cpu
