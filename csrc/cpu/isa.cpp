#include "isa.hpp"

#include <cstdlib>
#include <stdexcept>

namespace ropool::cpu {

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_neon();

namespace {

struct Isa {
    const char* name;
    bool present;
    const Kernels& (*kernels)();
};

// Worst first.
std::vector<Isa> compiled_isas() {
    std::vector<Isa> isas = {{"scalar", true, kernels_baseline}};
#ifdef ROPOOL_HAVE_NEON
    isas.push_back({"neon", true, kernels_neon});
#endif
#ifdef ROPOOL_HAVE_AVX2
    // These also ask the operating system whether it saves the wide registers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    isas.push_back({"avx2", avx2, kernels_avx2});
#endif
#ifdef ROPOOL_HAVE_AVX512
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    isas.push_back({"avx512", avx512, kernels_avx512});
#endif
    return isas;
}

struct Choice {
    IsaReport report;
    const Kernels* kernels = nullptr;
};

Choice choose() {
    Choice choice;
    const char* wanted = std::getenv("ROPOOL_CPU_ISA");
    const bool any = wanted == nullptr || *wanted == '\0';
    for (const Isa& isa : compiled_isas()) {
        choice.report.compiled.emplace_back(isa.name);
        if (!isa.present) continue;
        choice.report.available.emplace_back(isa.name);
        if (any || choice.report.available.back() == wanted) {
            choice.report.chosen = isa.name;
            choice.kernels = &isa.kernels();
        }
    }
    if (choice.kernels != nullptr) return choice;
    std::string message = "ROPOOL_CPU_ISA=" + std::string(wanted) + " cannot be used here; choose one of";
    for (const std::string& name : choice.report.available) message += " " + name;
    throw std::invalid_argument(message);
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

const IsaReport& isa_report() { return choice().report; }
const Kernels& kernels() { return *choice().kernels; }

}  // namespace ropool::cpu
