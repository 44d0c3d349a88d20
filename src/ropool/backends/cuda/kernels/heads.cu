// One kernel for the five ops. A token's work is cut into rows (one query, key or value head, or a part
// of an MLA row), a row into units of two vectors of V elements: with neox pairs the two halves of V
// pairs, so that a thread holds both ends of every rotation. A thread takes one unit of several rows of
// a token: it issues the loads of all of them, and the reads of position and slot, before the first
// use, and reads the unit's cos/sin once for all its rows. A block serves one kind of rows (queries,
// keys, values) of a few tokens; the blocks of a group of tokens are neighbours, so that they share the
// cos/sin rows while these are in L2.
//
// Byte floor: each query read and written, each key and value read, each pool row written, once. The
// cos/sin rows come from L1 and L2 after the first unit that needs them.
//
// What is upper-case or named by a format (`Model`, `KPool`, ...) stands in the prelude that Python
// writes for a specialisation, and so does `Params`.

// ---- work items -------------------------------------------------------------------------------

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

// ---- positions and angles -----------------------------------------------------------------------

constexpr int STREAMS = MROPE ? 3 : 1;

struct Place {
  i64 row[STREAMS];
  bool valid;  // all positions are inside the table
};

template <bool EARLY> DEVICE Place place_of(const Params& p, i64 token, bool active) {
  Place place = {};
  i64 offset = 0;
  if (active) {
#pragma unroll
    for (int s = 0; s < STREAMS; ++s)
      place.row[s] = load_index<PositionInt, EARLY>(p.positions, s * p.position_stream + token);
    if constexpr (HAS_OFFSETS) offset = load_index<OffsetInt, EARLY>(p.offsets, token);
  }
  place.valid = active;
#pragma unroll
  for (int s = 0; s < STREAMS; ++s) {
    place.row[s] += offset;
    place.valid = place.valid && place.row[s] >= 0 && place.row[s] < p.max_position;
  }
  return place;
}

DEVICE bool same_place(const Place& a, const Place& b) {
  bool equal = a.valid == b.valid;
#pragma unroll
  for (int s = 0; s < STREAMS; ++s) equal = equal && a.row[s] == b.row[s];
  return equal;
}

// cos and sin of the V pairs of a unit; with interleaved pairs the first V/2 belong to its first vector.
template <int V> struct Angles {
  float cos[V], sin[V];
};

DEVICE int stream_of(int frequency) {
  if constexpr (MROPE == 2) {
    const int kind = frequency % 3;
    if (kind == 1 && frequency < 3 * SECTION_H) return 1;
    if (kind == 2 && frequency < 3 * SECTION_W) return 2;
    return 0;
  } else
    return frequency < SECTION_T ? 0 : frequency < SECTION_T + SECTION_H ? 1 : 2;
}

template <int N> DEVICE void load_angles(const Params& p, const Place& place, int at, float* cos, float* sin) {
  constexpr int width = least(N, TABLE_WIDTH);
  const char* row[STREAMS];
#pragma unroll
  for (int s = 0; s < STREAMS; ++s)
    row[s] = p.table + ((place.valid ? place.row[s] : 0) * p.table_row + at) * Table::size;
  if constexpr (!MROPE) {
    load_floats<Table, N, width, KEEP_TABLE>(row[0], cos);
    load_floats<Table, N, width, KEEP_TABLE>(row[0] + R / 2 * Table::size, sin);
  } else if constexpr (MROPE == 1 && SECTION_T % N == 0 && SECTION_H % N == 0) {
    // Sections of whole vectors: each comes from one row.
    const int s = stream_of(at);
    const char* from = s == 0 ? row[0] : s == 1 ? row[1] : row[2];
    load_floats<Table, N, width, KEEP_TABLE>(from, cos);
    load_floats<Table, N, width, KEEP_TABLE>(from + R / 2 * Table::size, sin);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int s = stream_of(at + i);
      const char* from = (s == 0 ? row[0] : s == 1 ? row[1] : row[2]) + i * Table::size;
      load_floats<Table, 1, 1, KEEP_TABLE>(from, cos + i);
      load_floats<Table, 1, 1, KEEP_TABLE>(from + R / 2 * Table::size, sin + i);
    }
  }
}

template <int V> DEVICE void load_unit_angles(const Params& p, const Place& place, int unit, Angles<V>& angles) {
  if constexpr (INTERLEAVED && V > 1) {
    load_angles<V / 2>(p, place, unit * (V / 2), angles.cos, angles.sin);
    load_angles<V / 2>(p, place, R / 4 + unit * (V / 2), angles.cos + V / 2, angles.sin + V / 2);
  } else
    load_angles<V>(p, place, unit * V, angles.cos, angles.sin);
}

// The table rows of a unit, into L2.
template <int V> DEVICE void prefetch_angles(const Params& p, const Place& place, int unit) {
#pragma unroll
  for (int s = 0; s < STREAMS; ++s) {
    const i64 row = (place.valid ? place.row[s] : 0) * p.table_row;
    const int at = INTERLEAVED && V > 1 ? unit * (V / 2) : unit * V;
    prefetch(p.table + (row + at) * Table::size);
    prefetch(p.table + (row + at + R / 2) * Table::size);
    if constexpr (INTERLEAVED && V > 1) {
      prefetch(p.table + (row + at + R / 4) * Table::size);
      prefetch(p.table + (row + at + R / 4 + R / 2) * Table::size);
    }
  }
}

DEVICE void turn_pair(float& x, float& y, float cos, float sin) {
  const float turned = x * cos - y * sin;
  y = y * cos + x * sin;
  x = turned;
}

template <int V> DEVICE void turn(float* first, float* second, const Angles<V>& angles) {
  if constexpr (INTERLEAVED && V > 1) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      turn_pair(first[2 * i], first[2 * i + 1], angles.cos[i], angles.sin[i]);
      turn_pair(second[2 * i], second[2 * i + 1], angles.cos[V / 2 + i], angles.sin[V / 2 + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) turn_pair(first[i], second[i], angles.cos[i], angles.sin[i]);
  }
}

// ---- rows in registers --------------------------------------------------------------------------

// One unit of `ROWS` rows in each of `COLUMNS` columns, as loaded.
template <int ROWS, int COLUMNS, int V> struct Raw {
  u32 w[ROWS][COLUMNS][2][words<Model, V>];
};

template <int V> DEVICE void prefetch_unit(const char* row, int first, int second, bool both) {
  prefetch(row + first * Model::size);
  if (both) prefetch(row + second * Model::size);
}

template <int V> DEVICE void load_unit(const char* row, int first, int second, bool both, u32 (*w)[words<Model, V>]) {
  load_stream<V * Model::size>(row + first * Model::size, w[0]);
  if (both) load_stream<V * Model::size>(row + second * Model::size, w[1]);
}

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

template <int N> DEVICE void scale_by(float* x, float factor) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= factor;
}

template <int N> DEVICE void scale_by(float* x, float factor, const float* weight) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = x[i] * factor * weight[i];
}

// The fp8 scales of a thread's rows; `KIND` is 0 for none (1), 1 for one scale, 2 for one a head.
template <int KIND, int ROWS, int LANES, int HEADS>
DEVICE void load_scales(const char* scales, const Item& item, float* scale) {
#pragma unroll
  for (int u = 0; u < ROWS; ++u) {
    scale[u] = 1.0f;
    const int head = item.lane + u * LANES;
    u32 w;
    if (KIND != 0 && head < HEADS) {
      load_cached<4, false>(scales + (KIND == 2 ? head * 4 : 0), &w);
      scale[u] = __uint_as_float(w);
    }
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

// ---- stores into the pool ------------------------------------------------------------------------

// Write a vector of a row whose dims stand in groups of `GROUP` (0: all dims are contiguous).
template <class F, int V, int GROUP, int ALIGN>
DEVICE void store_vector(char* row, i64 group_stride, int dim, const u32* w) {
  if constexpr (GROUP == 0) {
    store_bytes<V * F::size, ALIGN>(row + dim * F::size, w);
  } else {
    constexpr int run = least(V, GROUP & -GROUP);
#pragma unroll
    for (int i = 0; i < V; i += run) {
      const int at = dim + i;
      char* to = row + at / GROUP * group_stride + at % GROUP * F::size;
      store_bytes<run * F::size, ALIGN>(to, w, i * F::size);
    }
  }
}

template <class F, int V, int GROUP, int ALIGN>
DEVICE void store_floats(char* row, i64 group_stride, int dim, const float* x) {
  u32 w[words<F, V>];
  pack<F, V>(x, w);
  store_vector<F, V, GROUP, ALIGN>(row, group_stride, dim, w);
}

// Write one unit of a value row; `scale` is that of its head or tile.
template <class C, int V>
DEVICE void store_value(const Params& p, i64 slot, int head, int unit, const u32 (*w)[words<Model, V>],
                        float scale) {
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
      if constexpr (V_SCALE || TILES) scale_by<V>(x, 1.0f / scale);
      store_floats<VPool, V, V_GROUP, V_POOL_ALIGN>(row, p.v_dim_group, dim[half], x);
    }
  }
}

// ---- queries --------------------------------------------------------------------------------------

using QCut = Cut<D, R, VQ>;

template <int V = VQ> DEVICE void run_queries(const Params& p, i64 first, int block) {
  constexpr int columns = ceil_div(Q_UNITS, Q_TEAM);
  const Item item = item_of<Q_TEAM, Q_LANES>(p, first, block);
  if (!Q_NORM && !item.active) return;
  char* rows = p.q + (item.token * p.q_token + item.lane * p.q_head) * Model::size;

  Place guess = {};
  if constexpr (EARLY) {
    if (item.active) {
#pragma unroll
      for (int u = 0; u < UQ; ++u) {
        if (item.lane + u * Q_LANES < HQ && item.unit < Q_UNITS)
          prefetch_unit<V>(rows + u * Q_LANES * p.q_head * Model::size, QCut::first(item.unit),
                           QCut::second(item.unit), QCut::has_second(item.unit));
      }
    }
    prefetch_constants<Q_SCALE, HQ, Q_NORM ? D * QNorm::size : 0>(p.q_scale, p.q_norm, item);
    guess = place_of<true>(p, item.token, item.active);
    if (item.unit < QCut::turned) prefetch_angles<V>(p, guess, item.unit);
  }
  wait_for_previous_kernel();
  const Place place = place_of<false>(p, item.token, item.active);

  Raw<UQ, columns, V> raw;
  bool present[UQ][columns];
#pragma unroll
  for (int u = 0; u < UQ; ++u) {
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      const int unit = item.unit + j * Q_TEAM;
      present[u][j] = item.active && item.lane + u * Q_LANES < HQ && unit < Q_UNITS;
      if constexpr (Q_NORM) {
#pragma unroll
        for (int i = 0; i < words<Model, V>; ++i) raw.w[u][j][0][i] = raw.w[u][j][1][i] = 0;
      }
      if (present[u][j])
        load_unit<V>(rows + u * Q_LANES * p.q_head * Model::size, QCut::first(unit), QCut::second(unit),
                     QCut::has_second(unit), raw.w[u][j]);
    }
  }

  float scale[UQ];
  load_scales<Q_SCALE, UQ, Q_LANES, HQ>(p.q_scale, item, scale);

  float weight[columns][2][V];
  Angles<V> angles[columns];
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    const int unit = item.unit + j * Q_TEAM;
    if constexpr (Q_NORM) {
      if (unit < Q_UNITS) {
        load_floats<QNorm, V, Q_NORM_WIDTH>(p.q_norm + QCut::first(unit) * QNorm::size, weight[j][0]);
        if (QCut::has_second(unit))
          load_floats<QNorm, V, Q_NORM_WIDTH>(p.q_norm + QCut::second(unit) * QNorm::size, weight[j][1]);
      }
    }
    if (unit < QCut::turned) load_unit_angles<V>(p, EARLY ? guess : place, unit, angles[j]);
  }
  if constexpr (EARLY) {
    if (!same_place(guess, place)) {
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        const int unit = item.unit + j * Q_TEAM;
        if (unit < QCut::turned) load_unit_angles<V>(p, place, unit, angles[j]);
      }
    }
  }

  float factor[UQ];
  if constexpr (Q_NORM) {
#pragma unroll
    for (int u = 0; u < UQ; ++u) {
      factor[u] = 0.0f;
#pragma unroll
      for (int j = 0; j < columns; ++j)
        factor[u] += sum_of_squares<V>(raw.w[u][j][0]) + sum_of_squares<V>(raw.w[u][j][1]);
    }
#pragma unroll
    for (int u = 0; u < UQ; ++u)
      factor[u] = rsqrtf(team_sum<Q_TEAM>(factor[u]) * (1.0f / D) + __uint_as_float(u32(p.norm_eps)));
  }
  if (!place.valid) return;

#pragma unroll
  for (int u = 0; u < UQ; ++u) {
    const int head = item.lane + u * Q_LANES;
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (!present[u][j]) continue;
      const int unit = item.unit + j * Q_TEAM;
      float x[2][V];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unpack<Model, V>(raw.w[u][j][half], x[half]);
        if constexpr (Q_NORM) scale_by<V>(x[half], factor[u], weight[j][half]);
      }
      if (unit < QCut::turned) turn<V>(x[0], x[1], angles[j]);
      if constexpr (Q_OUT) {
        char* to = p.q_out + (item.token * p.q_out_token + head * p.q_out_head) * QOut::size;
        if constexpr (Q_SCALE) {
          scale_by<V>(x[0], 1.0f / scale[u]);
          scale_by<V>(x[1], 1.0f / scale[u]);
        }
        store_floats<QOut, V, 0, Q_OUT_ALIGN>(to, 0, QCut::first(unit), x[0]);
        if (QCut::has_second(unit)) store_floats<QOut, V, 0, Q_OUT_ALIGN>(to, 0, QCut::second(unit), x[1]);
      } else {
        char* to = rows + u * Q_LANES * p.q_head * Model::size;
        store_floats<Model, V, 0, V * Model::size>(to, 0, QCut::first(unit), x[0]);
        if (QCut::has_second(unit)) store_floats<Model, V, 0, V * Model::size>(to, 0, QCut::second(unit), x[1]);
      }
    }
  }
}

// ---- keys and values --------------------------------------------------------------------------------

// Keys and values of the same width share their threads, and so one look at the slot.
using KCut = Cut<D, R, VK>;

template <int V = VK> DEVICE void run_keys(const Params& p, i64 first, int block) {
  constexpr int columns = ceil_div(K_UNITS, K_TEAM);
  constexpr int value_rows = MERGED ? UK : 1;
  const Item item = item_of<K_TEAM, K_LANES>(p, first, block);
  if (!K_NORM && !item.active) return;
  char* rows = p.k + (item.token * p.k_token + item.lane * p.k_head) * Model::size;
  char* value_rows_at = p.v + (item.token * p.v_token + item.lane * p.v_head) * Model::size;

  Place guess = {};
  if constexpr (EARLY) {
    if (item.active) {
      if constexpr (STORE) prefetch_slot(p, item.token);
#pragma unroll
      for (int u = 0; u < UK; ++u) {
        if (item.lane + u * K_LANES < HK && item.unit < K_UNITS) {
          prefetch_unit<V>(rows + u * K_LANES * p.k_head * Model::size, KCut::first(item.unit),
                           KCut::second(item.unit), KCut::has_second(item.unit));
          if constexpr (MERGED)
            prefetch_unit<V>(value_rows_at + u * K_LANES * p.v_head * Model::size, KCut::first(item.unit),
                             KCut::second(item.unit), KCut::has_second(item.unit));
        }
      }
    }
    prefetch_constants<K_SCALE, HK, K_NORM ? D * KNorm::size : 0>(p.k_scale, p.k_norm, item);
    if constexpr (MERGED) prefetch_constants<V_SCALE, HK, 0>(p.v_scale, nullptr, item);
    if constexpr (R > 0) {
      guess = place_of<true>(p, item.token, item.active);
      if (item.unit < KCut::turned) prefetch_angles<V>(p, guess, item.unit);
    }
  }
  wait_for_previous_kernel();

  Place place = {};
  place.valid = item.active;
  if constexpr (R > 0) place = place_of<false>(p, item.token, item.active);
  i64 entry = -1;
  if constexpr (STORE) {
    if (item.active) entry = load_index<SlotInt, false>(p.slots, item.token);
  }

  Raw<UK, columns, V> raw;
  Raw<value_rows, columns, V> values;
  bool present[UK][columns];
#pragma unroll
  for (int u = 0; u < UK; ++u) {
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      const int unit = item.unit + j * K_TEAM;
      present[u][j] = item.active && item.lane + u * K_LANES < HK && unit < K_UNITS;
      if constexpr (K_NORM) {
#pragma unroll
        for (int i = 0; i < words<Model, V>; ++i) raw.w[u][j][0][i] = raw.w[u][j][1][i] = 0;
      }
      if (present[u][j]) {
        load_unit<V>(rows + u * K_LANES * p.k_head * Model::size, KCut::first(unit), KCut::second(unit),
                     KCut::has_second(unit), raw.w[u][j]);
        if constexpr (MERGED)
          load_unit<V>(value_rows_at + u * K_LANES * p.v_head * Model::size, KCut::first(unit), KCut::second(unit),
                       KCut::has_second(unit), values.w[u][j]);
      }
    }
  }

  float scale[UK], value_scale[UK];
  load_scales<K_SCALE, UK, K_LANES, HK>(p.k_scale, item, scale);
  load_scales<MERGED ? V_SCALE : 0, UK, K_LANES, HK>(p.v_scale, item, value_scale);

  float weight[columns][2][V];
  Angles<V> angles[columns];
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    const int unit = item.unit + j * K_TEAM;
    if constexpr (K_NORM) {
      if (unit < K_UNITS) {
        load_floats<KNorm, V, K_NORM_WIDTH>(p.k_norm + KCut::first(unit) * KNorm::size, weight[j][0]);
        if (KCut::has_second(unit))
          load_floats<KNorm, V, K_NORM_WIDTH>(p.k_norm + KCut::second(unit) * KNorm::size, weight[j][1]);
      }
    }
    if constexpr (R > 0) {
      if (unit < KCut::turned) load_unit_angles<V>(p, EARLY ? guess : place, unit, angles[j]);
    }
  }
  if constexpr (EARLY && R > 0) {
    if (!same_place(guess, place)) {
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        const int unit = item.unit + j * K_TEAM;
        if (unit < KCut::turned) load_unit_angles<V>(p, place, unit, angles[j]);
      }
    }
  }
  i64 slot = -1;
  if constexpr (STORE) slot = slot_of(p, entry);

  float factor[UK];
  if constexpr (K_NORM) {
#pragma unroll
    for (int u = 0; u < UK; ++u) {
      factor[u] = 0.0f;
#pragma unroll
      for (int j = 0; j < columns; ++j)
        factor[u] += sum_of_squares<V>(raw.w[u][j][0]) + sum_of_squares<V>(raw.w[u][j][1]);
    }
#pragma unroll
    for (int u = 0; u < UK; ++u)
      factor[u] = rsqrtf(team_sum<K_TEAM>(factor[u]) * (1.0f / D) + __uint_as_float(u32(p.norm_eps)));
  }
  if (!place.valid || (!WRITE_K && slot < 0)) return;

#pragma unroll
  for (int u = 0; u < UK; ++u) {
    const int head = item.lane + u * K_LANES;
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (!present[u][j]) continue;
      const int unit = item.unit + j * K_TEAM;
      const int dim[2] = {KCut::first(unit), KCut::second(unit)};
      float x[2][V];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unpack<Model, V>(raw.w[u][j][half], x[half]);
        if constexpr (K_NORM) scale_by<V>(x[half], factor[u], weight[j][half]);
      }
      if constexpr (R > 0) {
        if (unit < KCut::turned) turn<V>(x[0], x[1], angles[j]);
      }
      if constexpr (WRITE_K) {
        if (K_NORM || unit < KCut::turned) {
          char* to = rows + u * K_LANES * p.k_head * Model::size;
          store_floats<Model, V, 0, V * Model::size>(to, 0, dim[0], x[0]);
          if (KCut::has_second(unit)) store_floats<Model, V, 0, V * Model::size>(to, 0, dim[1], x[1]);
        }
      }
      if constexpr (STORE) {
        if (slot < 0) continue;
        char* to = key_row(p, slot, head);
        if constexpr (K_SCALE) {
          scale_by<V>(x[0], 1.0f / scale[u]);
          scale_by<V>(x[1], 1.0f / scale[u]);
        }
        store_floats<KPool, V, K_GROUP, K_POOL_ALIGN>(to, p.k_dim_group, dim[0], x[0]);
        if (KCut::has_second(unit)) store_floats<KPool, V, K_GROUP, K_POOL_ALIGN>(to, p.k_dim_group, dim[1], x[1]);
        if constexpr (MERGED) store_value<KCut, V>(p, slot, head, unit, values.w[u][j], value_scale[u]);
      }
    }
  }
}

using VCut = Cut<DV, 0, VV>;

template <int V = VV> DEVICE void run_values(const Params& p, i64 first, int block) {
  constexpr int columns = ceil_div(V_UNITS, V_TEAM);
  const Item item = item_of<V_TEAM, V_LANES>(p, first, block);
  if (!TILES && !item.active) return;
  const char* rows = p.v + (item.token * p.v_token + item.lane * p.v_head) * Model::size;
  if constexpr (EARLY) {
    if (item.active) {
      prefetch_slot(p, item.token);
      if constexpr (R > 0) prefetch(p.positions + item.token * i64(sizeof(PositionInt)));
#pragma unroll
      for (int u = 0; u < UV; ++u) {
        if (item.lane + u * V_LANES < HV && item.unit < V_UNITS)
          prefetch_unit<V>(rows + u * V_LANES * p.v_head * Model::size, VCut::first(item.unit),
                           VCut::second(item.unit), VCut::has_second(item.unit));
      }
    }
  }
  wait_for_previous_kernel();
  bool valid = item.active;
  // A token outside of the table is dropped altogether, its value too.
  if constexpr (R > 0) valid = place_of<false>(p, item.token, item.active).valid;
  i64 entry = -1;
  if (item.active) entry = load_index<SlotInt, false>(p.slots, item.token);

  Raw<UV, columns, V> raw;
  bool present[UV][columns];
#pragma unroll
  for (int u = 0; u < UV; ++u) {
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      const int head = item.lane + u * V_LANES, unit = item.unit + j * V_TEAM;
      present[u][j] = item.active && head < HV && unit < V_UNITS;
      if constexpr (TILES) {
#pragma unroll
        for (int i = 0; i < words<Model, V>; ++i) raw.w[u][j][0][i] = raw.w[u][j][1][i] = 0;
      }
      if (present[u][j])
        load_unit<V>(rows + u * V_LANES * p.v_head * Model::size, VCut::first(unit), VCut::second(unit),
                     VCut::has_second(unit), raw.w[u][j]);
    }
  }
  float scale[UV];
  load_scales<V_SCALE, UV, V_LANES, HV>(p.v_scale, item, scale);
  const i64 slot = slot_of(p, entry);

  float largest[UV];
  if constexpr (TILES) {
#pragma unroll
    for (int u = 0; u < UV; ++u) {
      largest[u] = 0.0f;
#pragma unroll
      for (int j = 0; j < columns; ++j)
        largest[u] = fmaxf(largest[u], fmaxf(largest_of<V>(raw.w[u][j][0]), largest_of<V>(raw.w[u][j][1])));
    }
#pragma unroll
    for (int u = 0; u < UV; ++u) largest[u] = team_largest<V_TEAM>(largest[u]);
  }
  if (!valid || slot < 0) return;

#pragma unroll
  for (int u = 0; u < UV; ++u) {
    const int head = item.lane + u * V_LANES;
    if constexpr (TILES) {
      // Finite, so that an infinite latent saturates, and normal, so that a tile of zeros stays zero.
      scale[u] = fmaxf(fminf(largest[u], 3.402823466e38f) / 448.0f, 1.17549435e-38f);
      if (item.unit == 0 && present[u][0]) {
        const u32 bits = __float_as_uint(scale[u]);
        store_bytes<4, V_POOL_ALIGN>(value_row(p, slot, 0) + HV * DV + 4 * head, &bits);
      }
    }
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (present[u][j]) store_value<VCut, V>(p, slot, head, item.unit + j * V_TEAM, raw.w[u][j], scale[u]);
    }
  }
}

// ---- rows of two parts ------------------------------------------------------------------------------

// An MLA row that is stored as it came: the latent part and the rope part are copied by one team, so
// that a row is written at once.
template <int V = VV> DEVICE void run_rows(const Params& p, i64 first, int block) {
  constexpr int bytes = V * Model::size, latent = DV / V, vectors = (DV + D) / V;
  const Item item = item_of<V_TEAM, 1>(p, first, block);
  if (!item.active) return;
  const char* source[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = item.unit + half * V_TEAM;
    source[half] = at < latent ? p.v + item.token * p.v_token * Model::size + at * bytes
                               : p.k + item.token * p.k_token * Model::size + (at - latent) * bytes;
  }
  const bool both = vectors % 2 == 0 || item.unit + V_TEAM < vectors;
  if constexpr (EARLY) {
    prefetch_slot(p, item.token);
    prefetch(source[0]);
    if (both) prefetch(source[1]);
  }
  wait_for_previous_kernel();
  const i64 entry = load_index<SlotInt, false>(p.slots, item.token);
  u32 w[2][words<Model, V>];
  load_stream<bytes>(source[0], w[0]);
  if (both) load_stream<bytes>(source[1], w[1]);
  const i64 slot = slot_of(p, entry);
  if (slot < 0) return;
  char* row = value_row(p, slot, 0) + item.unit * bytes;
  store_bytes<bytes, V_POOL_ALIGN>(row, w[0]);
  if (both) store_bytes<bytes, V_POOL_ALIGN>(row + V_TEAM * bytes, w[1]);
}

// ---- the kernel -----------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS) ropool_kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  const i64 first = i64(blockIdx.x / (K_BLOCKS + V_BLOCKS + Q_BLOCKS)) * GROUP;
  const int block = blockIdx.x % (K_BLOCKS + V_BLOCKS + Q_BLOCKS);
  if constexpr (HK > 0 && !JOINED) {
    if (block < K_BLOCKS) return run_keys(p, first, block);
  }
  if constexpr (JOINED) {
    return run_rows(p, first, block);
  }
  if constexpr (HV > 0 && !MERGED) {
    if (block < K_BLOCKS + V_BLOCKS) return run_values(p, first, block - K_BLOCKS);
  }
  if constexpr (HQ > 0) run_queries(p, first, block - K_BLOCKS - V_BLOCKS);
}
