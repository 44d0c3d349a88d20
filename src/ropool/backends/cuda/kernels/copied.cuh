// Rows that are not turned: values, which may be quantised, and MLA rows that are stored as they came.

DEVICE void run_values(const Params& p, i64 first, int block) {
  const Item item = item_of<V_TEAM, V_LANES>(p, first, block);
  if (!TILES && !item.active) return;
  Rows<Value> rows = Rows<Value>::at(p.v, p.v_token, p.v_head, item);
  if constexpr (EARLY) {
    if (item.active) {
      prefetch_slot(p, item.token);
      if constexpr (R > 0) prefetch(p.positions + item.token * i64(sizeof(PositionInt)));
    }
    rows.fetch_early(item);
  }
  wait_for_previous_kernel();
  bool valid = item.active;
  // A token outside of the table is dropped altogether, its value too.
  if constexpr (R > 0) valid = place_of<false>(p, item.token, item.active).valid;
  i64 entry = -1;
  if (item.active) entry = load_index<SlotInt, false>(p.slots, item.token);
  rows.load(item);
  float scale[UV];
  load_scales<Value, V_SCALE>(p.v_scale, item, scale);
  const i64 slot = slot_of(p, entry);

  float largest[UV];
  if constexpr (TILES) {
#pragma unroll
    for (int u = 0; u < UV; ++u) {
      largest[u] = 0.0f;
#pragma unroll
      for (int j = 0; j < Value::columns; ++j)
        largest[u] = fmaxf(largest[u], fmaxf(largest_of<VV>(rows.w[u][j][0]), largest_of<VV>(rows.w[u][j][1])));
    }
#pragma unroll
    for (int u = 0; u < UV; ++u) largest[u] = team_largest<V_TEAM>(largest[u]);
  }
  if (!valid || slot < 0) return;
  if constexpr (!TILES) invert<V_SCALE, UV>(scale);

#pragma unroll
  for (int u = 0; u < UV; ++u) {
    const int head = item.lane + u * V_LANES;
    if constexpr (TILES) {
      // Finite, so that an infinite latent saturates, and normal, so that a tile of zeros stays zero.
      scale[u] = fmaxf(divided(fminf(largest[u], 3.402823466e38f), 448.0f, 1.0f / 448.0f), 1.17549435e-38f);
      if (item.unit == 0 && rows.present(item, u, 0)) {
        const u32 bits = __float_as_uint(scale[u]);
        store_bytes<4, V_POOL_ALIGN>(value_row(p, slot, 0) + HV * DV + 4 * head, &bits);
      }
    }
#pragma unroll
    for (int j = 0; j < Value::columns; ++j) {
      if (rows.present(item, u, j))
        store_value<Value::Cut, VV>(p, slot, head, item.unit + j * V_TEAM, rows.w[u][j], scale[u]);
    }
  }
}

// An MLA row that is stored as it came: the latent part and the rope part are copied by one team, so
// that a row is written at once.
DEVICE void run_joined(const Params& p, i64 first, int block) {
  constexpr int bytes = VV * Model::size, latent = DV / VV, vectors = (DV + D) / VV;
  constexpr int columns = ceil_div(vectors, V_TEAM);
  const Item item = item_of<V_TEAM, 1>(p, first, block);
  if (!item.active) return;
  const char* source[columns];
  bool present[columns];
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    const int at = item.unit + j * V_TEAM;
    present[j] = vectors % V_TEAM == 0 || at < vectors;
    source[j] = at < latent ? p.v + item.token * p.v_token * Model::size + at * bytes
                            : p.k + item.token * p.k_token * Model::size + (at - latent) * bytes;
  }
  if constexpr (EARLY) {
    prefetch_slot(p, item.token);
#pragma unroll
    for (int j = 0; j < columns; ++j)
      if (present[j]) prefetch(source[j]);
  }
  wait_for_previous_kernel();
  const i64 entry = load_index<SlotInt, false>(p.slots, item.token);
  u32 w[columns][words<Model, VV>];
#pragma unroll
  for (int j = 0; j < columns; ++j)
    if (present[j]) load_stream<bytes>(source[j], w[j]);
  const i64 slot = slot_of(p, entry);
  if (slot < 0) return;
  char* row = value_row(p, slot, 0) + item.unit * bytes;
#pragma unroll
  for (int j = 0; j < columns; ++j)
    if (present[j]) store_bytes<bytes, V_POOL_ALIGN>(row + j * V_TEAM * bytes, w[j]);
}
