// One kernel for the five ops. A token's work is cut into rows (one query, key or value head, or a part
// of an MLA row), a row into units of two vectors of V elements: with neox pairs the two halves of V
// pairs, so that a thread holds both ends of every rotation. A thread takes one unit of several rows of
// a token: it issues the loads of all of them, and the reads of position and slot, before the first
// use, and reads the unit's cos/sin once for all its rows. A block serves one kind of rows (queries,
// keys, values) of a few tokens, or queries and keys alike (`JOINT`); the blocks of a group of tokens
// are neighbours, so that they share the cos/sin rows while these are in L2.
//
// Byte floor: each query read and written, each key and value read, each pool row written, once. The
// cos/sin rows come from L1 and L2 after the first unit that needs them.
//
// What is upper-case or named by a format (`Model`, `KPool`, ...) stands in the prelude that Python
// writes for a specialisation, and so does `Params`.

extern "C" __global__ void __launch_bounds__(THREADS) ropool_kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  const i64 first = i64(blockIdx.x / (K_BLOCKS + V_BLOCKS + Q_BLOCKS)) * GROUP;
  const int block = blockIdx.x % (K_BLOCKS + V_BLOCKS + Q_BLOCKS);
  if constexpr (JOINED) {
    return run_joined(p, first, block);
  } else {
    if constexpr (K_BLOCKS > 0) {
      if (block < K_BLOCKS) return run_turned<false, true>(p, first, block);
    }
    if constexpr (V_BLOCKS > 0) {
      if (block < K_BLOCKS + V_BLOCKS) return run_values(p, first, block - K_BLOCKS);
    }
    if constexpr (Q_BLOCKS > 0) run_turned<true, JOINT>(p, first, block - K_BLOCKS - V_BLOCKS);
  }
}
