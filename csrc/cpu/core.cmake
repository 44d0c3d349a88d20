# The library ropool_cpu_core: the kernels of the cpu backend, without Python. For whoever includes this file.
set(ROPOOL_CORE_DIR "${CMAKE_CURRENT_LIST_DIR}")
find_package(Threads REQUIRED)

add_library(ropool_cpu_core STATIC
  ${ROPOOL_CORE_DIR}/gnu_openmp.cpp
  ${ROPOOL_CORE_DIR}/isa.cpp
  ${ROPOOL_CORE_DIR}/kernels_baseline.cpp
  ${ROPOOL_CORE_DIR}/plan.cpp
  ${ROPOOL_CORE_DIR}/pool_rows.cpp
  ${ROPOOL_CORE_DIR}/run.cpp
  ${ROPOOL_CORE_DIR}/thread_pool.cpp)
target_include_directories(ropool_cpu_core PUBLIC "${ROPOOL_CORE_DIR}/..")
target_link_libraries(ropool_cpu_core PUBLIC Threads::Threads ${CMAKE_DL_LIBS})
target_compile_options(ropool_cpu_core PRIVATE -O3 -Wall -Wextra)
set_target_properties(ropool_cpu_core PROPERTIES
  POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)

# An instruction set is one source file compiled with its own flags, and is left out where the compiler
# (or the processor it compiles for) does not have it.
include(CheckCXXSourceCompiles)
function(ropool_add_isa name flags probe)
  set(CMAKE_REQUIRED_FLAGS "${flags}")
  check_cxx_source_compiles("${probe}" ROPOOL_COMPILES_${name})
  if(ROPOOL_COMPILES_${name})
    string(TOLOWER ${name} lower)
    target_sources(ropool_cpu_core PRIVATE ${ROPOOL_CORE_DIR}/kernels_${lower}.cpp)
    separate_arguments(options UNIX_COMMAND "${flags}")
    set_source_files_properties(${ROPOOL_CORE_DIR}/kernels_${lower}.cpp PROPERTIES COMPILE_OPTIONS "${options}")
    target_compile_definitions(ropool_cpu_core PRIVATE ROPOOL_HAVE_${name})
  endif()
endfunction()

ropool_add_isa(AVX2 "-mavx2 -mfma -mf16c"
  "#include <immintrin.h>
   int main() { return _mm256_cvtsi256_si32(_mm256_setzero_si256()); }")
ropool_add_isa(AVX512 "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c"
  "#include <immintrin.h>
   int main() { return static_cast<int>(_mm512_reduce_add_epi32(_mm512_setzero_si512())); }")
ropool_add_isa(NEON ""
  "#include <arm_neon.h>
   #ifndef __aarch64__
   #error AArch64 only
   #endif
   int main() { return static_cast<int>(vaddvq_u32(vdupq_n_u32(0))); }")
