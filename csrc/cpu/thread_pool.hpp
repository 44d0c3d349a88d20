// Threads for one call: PyTorch's OpenMP team where the process has one (see gnu_openmp.hpp), a small pool of our own
// elsewhere and in forked children.
#pragma once

#include <cstdint>

namespace ropool::cpu {

using RangeFn = void (*)(void* context, std::int64_t begin, std::int64_t end);

// Bytes moved below which a call is one thread's work wherever it runs.
constexpr std::int64_t kThreadedBytes = 128 * 1024;

// How many of `threads` are worth starting to move `bytes`: one, or as many as there are processors that this process
// may use. Threads of PyTorch's team, which wait awake for the next operator, are worth it for less than our own.
int worthwhile_threads(std::int64_t bytes, int threads);

// Calls `range` on pieces that cover [0, units) once, on the calling thread and at most `threads - 1` workers, and
// returns when all are done. Runs inline when our own pool is busy with another caller. Allocates only when it has to
// start a worker.
void parallel_for(std::int64_t units, std::int64_t grain, int threads, RangeFn range, void* context);

// Must be called once before the first parallel_for: makes a forked child start with a pool of its own.
void install_fork_handler();

// From now on uses our own pool even where PyTorch's team is: for callers on other threads than PyTorch's, for which
// the OpenMP runtime would make a second team beside the first.
void use_own_threads();

}  // namespace ropool::cpu
