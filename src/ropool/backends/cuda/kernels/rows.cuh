// How a token's work is dealt out to threads, and the rows that a thread holds in registers.

// ---- whose work ---------------------------------------------------------------------------------

struct Item {
  i64 token;
  int lane, unit;  // rows `lane`, `lane + lanes`, ...; unit of the row
  bool active;
};

// The work of a thread in block `block` of those that serve one kind of rows of `GROUP` tokens from
// `first` on.
template <int TEAM, int LANES> DEVICE Item item_of(const Params& p, i64 first, int block) {
  constexpr int per_token = TEAM * LANES;
  int token, index;
  if constexpr (per_token <= THREADS) {
    constexpr int tokens = THREADS / per_token;
    token = block * tokens + threadIdx.x / per_token;
    index = threadIdx.x % per_token;
    if (threadIdx.x >= tokens * per_token) token = GROUP;
  } else {
    constexpr int blocks = ceil_div(per_token, THREADS);
    token = block / blocks;
    index = block % blocks * THREADS + threadIdx.x;
    if (index >= per_token) token = GROUP;
  }
  Item item;
  item.token = first + token;
  item.active = token < GROUP && item.token < p.tokens;
  item.unit = index % TEAM;
  item.lane = index / TEAM;
  return item;
}

// How a row of `D_` elements, the first `R_` of them turned, is cut into units of two vectors of `V_`.
template <int D_, int R_, int V_> struct Cut {
  static constexpr int vectors = D_ / V_, turned = R_ / 2 / V_, passed = vectors - R_ / V_;
  static constexpr int passed_units = (passed + 1) / 2;
  // Vectors of one element cannot hold an interleaved pair: its ends are then the two vectors.
  static constexpr bool split_pairs = INTERLEAVED && V_ == 1;

  DEVICE int first(int unit) {
    if (unit < turned) return split_pairs ? 2 * unit : unit * V_;
    return R_ + (unit - turned) * V_;
  }
  DEVICE int second(int unit) {
    if (unit < turned) return split_pairs ? 2 * unit + 1 : R_ / 2 + unit * V_;
    return R_ + (passed_units + unit - turned) * V_;
  }
  DEVICE bool has_second(int unit) {
    return passed % 2 == 0 || unit < turned || passed_units + unit - turned < passed;
  }
};

// ---- kinds of rows ------------------------------------------------------------------------------

// A row has `units`, `team` threads take one in each of `columns` columns; a thread takes `rows` rows,
// `lanes` apart. `whole`: the team reduces over a row, so that absent rows must count as zeros.
struct Query {
  using Cut = ::Cut<D, R, VQ>;
  using Norm = QNorm;
  static constexpr int heads = HQ, rows = UQ, lanes = Q_LANES, units = Q_UNITS, team = Q_TEAM;
  static constexpr int columns = ceil_div(units, team), width = VQ, norm_width = Q_NORM_WIDTH;
  static constexpr bool whole = Q_NORM;
};

struct Key {
  using Cut = ::Cut<D, R, VK>;
  using Norm = KNorm;
  static constexpr int heads = HK, rows = UK, lanes = K_LANES, units = K_UNITS, team = K_TEAM;
  static constexpr int columns = ceil_div(units, team), width = VK, norm_width = K_NORM_WIDTH;
  static constexpr bool whole = K_NORM;
};

// A value that shares its thread with the key of its head.
struct MergedValue : Key {
  static constexpr bool whole = false;
};

struct Value {
  using Cut = ::Cut<DV, 0, VV>;
  static constexpr int heads = HV, rows = UV, lanes = V_LANES, units = V_UNITS, team = V_TEAM;
  static constexpr int columns = ceil_div(units, team), width = VV;
  static constexpr bool whole = TILES;
};

// ---- rows in registers --------------------------------------------------------------------------

// A thread's part of a token's rows of one kind, as loaded. Row `u` is head `lane + u * lanes`.
template <class K> struct Rows {
  using C = typename K::Cut;
  static constexpr int V = K::width;
  u32 w[K::rows][K::columns][2][words<Model, V>];
  char* base;
  i64 step;

  DEVICE Rows at(char* tensor, i64 token_stride, i64 head_stride, const Item& item) {
    Rows rows;
    rows.base = tensor + (item.token * token_stride + item.lane * head_stride) * Model::size;
    rows.step = K::lanes * head_stride * Model::size;
    return rows;
  }
  __device__ __forceinline__ bool present(const Item& item, int u, int column) const {
    return item.active && item.lane + u * K::lanes < K::heads && item.unit + column * K::team < K::units;
  }
  __device__ __forceinline__ char* row(int u) const { return base + u * step; }

  // Into L2.
  __device__ __forceinline__ void fetch_early(const Item& item) const {
#pragma unroll
    for (int u = 0; u < K::rows; ++u) {
      if (!present(item, u, 0)) continue;
      prefetch(row(u) + C::first(item.unit) * Model::size);
      if (C::has_second(item.unit)) prefetch(row(u) + C::second(item.unit) * Model::size);
    }
  }
  __device__ __forceinline__ void load(const Item& item) {
#pragma unroll
    for (int u = 0; u < K::rows; ++u) {
#pragma unroll
      for (int j = 0; j < K::columns; ++j) {
        const int unit = item.unit + j * K::team;
        if constexpr (K::whole) {
#pragma unroll
          for (int i = 0; i < words<Model, V>; ++i) w[u][j][0][i] = w[u][j][1][i] = 0;
        }
        if (!present(item, u, j)) continue;
        load_stream<V * Model::size>(row(u) + C::first(unit) * Model::size, w[u][j][0]);
        if (C::has_second(unit)) load_stream<V * Model::size>(row(u) + C::second(unit) * Model::size, w[u][j][1]);
      }
    }
  }
};

// ---- sums over a row ----------------------------------------------------------------------------

template <int TEAM> DEVICE float team_sum(float x) {
#pragma unroll
  for (int o = TEAM / 2; o > 0; o /= 2) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

template <int TEAM> DEVICE float team_largest(float x) {
#pragma unroll
  for (int o = TEAM / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}

template <int N> DEVICE float sum_of_squares(const u32* w) {
  float x[N], sum = 0.0f;
  unpack<Model, N>(w, x);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += x[i] * x[i];
  return sum;
}

// fmaxf drops NaN.
template <int N> DEVICE float largest_of(const u32* w) {
  float x[N], largest = 0.0f;
  unpack<Model, N>(w, x);
#pragma unroll
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return largest;
}

// ---- factors --------------------------------------------------------------------------------------

// RMSNorm of a thread's rows: a factor for each row, and the weights of its units.
template <class K> struct RmsNorm {
  using C = typename K::Cut;
  static constexpr int V = K::width;
  float weight[K::columns][2][V], factor[K::rows];

  __device__ __forceinline__ void load(const char* weights, const Item& item) {
#pragma unroll
    for (int j = 0; j < K::columns; ++j) {
      const int unit = item.unit + j * K::team;
      if (unit >= K::units) continue;
      load_floats<typename K::Norm, V, K::norm_width>(weights + C::first(unit) * K::Norm::size, weight[j][0]);
      if (C::has_second(unit))
        load_floats<typename K::Norm, V, K::norm_width>(weights + C::second(unit) * K::Norm::size, weight[j][1]);
    }
  }
  __device__ __forceinline__ void sum(const Rows<K>& rows, float eps) {
#pragma unroll
    for (int u = 0; u < K::rows; ++u) {
      factor[u] = 0.0f;
#pragma unroll
      for (int j = 0; j < K::columns; ++j)
        factor[u] += sum_of_squares<V>(rows.w[u][j][0]) + sum_of_squares<V>(rows.w[u][j][1]);
    }
#pragma unroll
    for (int u = 0; u < K::rows; ++u) factor[u] = rsqrtf(team_sum<K::team>(factor[u]) * (1.0f / D) + eps);
  }
  __device__ __forceinline__ void apply(float* x, int u, int column, int half) const {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = x[i] * factor[u] * weight[column][half][i];
  }
};

DEVICE float load_float(const char* from) {
  u32 bits;
  load_cached<4, false>(from, &bits);
  return __uint_as_float(bits);
}

// The fp8 scales of a thread's rows; `KIND` is 0 for none (1), 1 for one scale, 2 for one a head.
template <class K, int KIND> DEVICE void load_scales(const char* scales, const Item& item, float* scale) {
  float one = 1.0f;
  if constexpr (KIND == 1) one = load_float(scales);
#pragma unroll
  for (int u = 0; u < K::rows; ++u) {
    const int head = item.lane + u * K::lanes;
    scale[u] = KIND == 2 && head < K::heads ? load_float(scales + head * 4) : one;
  }
}

// Their inverses, once every load has been issued.
template <int KIND, int N> DEVICE void invert(float* scale) {
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if constexpr (KIND == 2) scale[u] = inverse_of(scale[u]);
    if constexpr (KIND == 1) scale[u] = u > 0 ? scale[0] : inverse_of(scale[0]);
  }
}

// What every token reads, into L2; one block is enough.
template <int KIND, int HEADS, int NORM_BYTES>
DEVICE void prefetch_constants(const char* scales, const char* norm, const Item& item) {
  if (blockIdx.x >= K_BLOCKS + V_BLOCKS + Q_BLOCKS) return;
  if constexpr (KIND == 1) prefetch(scales);
  if constexpr (KIND == 2) prefetch(scales + least(item.lane, HEADS - 1) * 4);
  if constexpr (NORM_BYTES > 0) prefetch(norm + least(item.unit * 32, NORM_BYTES - 1));
}
