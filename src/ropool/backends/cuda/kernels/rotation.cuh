// Positions, and the cos and sin of a unit of a row.

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
    place.valid = place.valid && u64(place.row[s]) < u64(p.max_position);
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
