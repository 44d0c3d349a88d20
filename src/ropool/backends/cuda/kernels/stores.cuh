// Stores of vectors into the pool and into Q and K.

// Write a vector of a row whose dims stand in groups of `GROUP_` (0: all dims are contiguous).
template <class F, int V, int GROUP_, int ALIGN>
DEVICE void store_vector(char* row, i64 group_stride, int dim, const u32* w) {
  if constexpr (GROUP_ == 0) {
    store_bytes<V * F::size, ALIGN>(row + dim * F::size, w);
  } else {
    constexpr int run = least(V, GROUP_ & -GROUP_);
#pragma unroll
    for (int i = 0; i < V; i += run) {
      const int at = dim + i;
      char* to = row + at / GROUP_ * group_stride + at % GROUP_ * F::size;
      store_bytes<run * F::size, ALIGN>(to, w, i * F::size);
    }
  }
}

template <class F, int V, int GROUP_, int ALIGN>
DEVICE void store_floats(char* row, i64 group_stride, int dim, const float* x) {
  u32 w[words<F, V>];
  pack<F, V>(x, w);
  store_vector<F, V, GROUP_, ALIGN>(row, group_stride, dim, w);
}

// Write the two vectors of a unit to a row without groups.
template <class F, class C, int V, int ALIGN> DEVICE void store_unit(char* row, int unit, const u32 (*w)[words<F, V>]) {
  store_vector<F, V, 0, ALIGN>(row, 0, C::first(unit), w[0]);
  if (C::has_second(unit)) store_vector<F, V, 0, ALIGN>(row, 0, C::second(unit), w[1]);
}

// Write one unit of a value row; `factor` is the scale of its tile, or the
// inverse of that of its head.
template <class C, int V>
DEVICE void store_value(const Params& p, i64 slot, int head, int unit, const u32 (*w)[words<Model, V>],
                        float factor) {
  char* row = value_row(p, slot, head);
  const int dim[2] = {C::first(unit), C::second(unit)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && !C::has_second(unit)) return;
    if constexpr (same<VPool, Model>) {
      store_vector<VPool, V, V_GROUP, V_POOL_ALIGN>(row, p.v_dim_group, dim[half], w[half]);
    } else {
      float x[V];
      unpack<Model, V>(w[half], x);
      if constexpr (TILES) divide_by<V>(x, factor);
      else if constexpr (V_SCALE) scale_by<V>(x, factor);
      store_floats<VPool, V, V_GROUP, V_POOL_ALIGN>(row, p.v_dim_group, dim[half], x);
    }
  }
}
