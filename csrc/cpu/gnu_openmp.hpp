// The team of GNU's OpenMP runtime, if the process has loaded one: PyTorch's Linux builds bring it.
//
// Its threads spin for milliseconds after each operator of PyTorch, just when a call comes here. Threads of our own
// would have to share the processors with them while they spin. So the work goes to that team;
// the runtime is looked up in the process, never linked, since a second one would be one team more.
#pragma once

namespace ropool::cpu {

// GOMP_parallel of libgomp's ABI: calls `fn(data)` on `threads` threads, the caller's included, and waits for all;
// 0 means as many as the caller's `omp_set_num_threads` said, which is how PyTorch sizes its team.
using TeamFn = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

// Null without such a runtime. Looked up once; PyTorch's own is preferred to another package's.
TeamFn gnu_openmp_team();

}  // namespace ropool::cpu
