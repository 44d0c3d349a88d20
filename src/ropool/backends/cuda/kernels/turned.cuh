// Queries, and keys with the values that share their threads: the rows that are normalised and turned.

// cos and sin of a thread's units.
template <class K> DEVICE void load_turns(const Params& p, const Place& place, const Item& item,
                                          Angles<K::width>* angles) {
#pragma unroll
  for (int j = 0; j < K::columns; ++j) {
    const int unit = item.unit + j * K::team;
    if (unit < K::Cut::turned) load_unit_angles<K::width>(p, place, unit, angles[j]);
  }
}

// The float values of one unit of a row, normalised and turned.
template <class K> DEVICE void finished(const Rows<K>& rows, const RmsNorm<K>& norm, const Angles<K::width>* angles,
                                        const Item& item, int u, int column, float (*x)[K::width]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unpack<Model, K::width>(rows.w[u][column][half], x[half]);
    if constexpr (K::whole) norm.apply(x[half], u, column, half);
  }
  if constexpr (R > 0) {
    if (item.unit + column * K::team < K::Cut::turned) turn<K::width>(x[0], x[1], angles[column]);
  }
}

// The two vectors of one unit of a row in format `F`. Dims that are neither normalised nor turned keep
// their bits, those of a NaN too.
template <class F, class K> DEVICE void packed(const Rows<K>& rows, const Item& item, int u, int column,
                                               const float (*x)[K::width], u32 (*w)[words<F, K::width>]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    pack<F, K::width>(x[half], w[half]);
    if constexpr (same<F, Model> && !K::whole && K::Cut::passed > 0) {
      if (K::Cut::turned == 0 || item.unit + column * K::team >= K::Cut::turned) {
#pragma unroll
        for (int i = 0; i < words<F, K::width>; ++i) w[half][i] = rows.w[u][column][half][i];
      }
    }
  }
}

DEVICE void store_queries(const Params& p, const Item& item, const Rows<Query>& rows, const RmsNorm<Query>& norm,
                          const Angles<VQ>* angles, const float* inverse) {
#pragma unroll
  for (int u = 0; u < UQ; ++u) {
    const int head = item.lane + u * Q_LANES;
#pragma unroll
    for (int j = 0; j < Query::columns; ++j) {
      if (!rows.present(item, u, j)) continue;
      const int unit = item.unit + j * Q_TEAM;
      float x[2][VQ];
      finished(rows, norm, angles, item, u, j, x);
      if constexpr (Q_OUT) {
        char* to = p.q_out + (item.token * p.q_out_token + head * p.q_out_head) * QOut::size;
        if constexpr (Q_SCALE) {
          scale_by<VQ>(x[0], inverse[u]);
          scale_by<VQ>(x[1], inverse[u]);
        }
        u32 w[2][words<QOut, VQ>];
        packed<QOut>(rows, item, u, j, x, w);
        store_unit<QOut, Query::Cut, VQ, Q_OUT_ALIGN>(to, unit, w);
      } else {
        u32 w[2][words<Model, VQ>];
        packed<Model>(rows, item, u, j, x, w);
        store_unit<Model, Query::Cut, VQ, VQ * Model::size>(rows.row(u), unit, w);
      }
    }
  }
}

DEVICE void store_keys(const Params& p, const Item& item, i64 slot, const Rows<Key>& rows, const RmsNorm<Key>& norm,
                       const Angles<VK>* angles, const float* inverse, const Rows<MergedValue>& values,
                       const float* value_inverse) {
#pragma unroll
  for (int u = 0; u < UK; ++u) {
    const int head = item.lane + u * K_LANES;
#pragma unroll
    for (int j = 0; j < Key::columns; ++j) {
      if (!rows.present(item, u, j)) continue;
      const int unit = item.unit + j * K_TEAM;
      float x[2][VK];
      finished(rows, norm, angles, item, u, j, x);
      if constexpr (WRITE_K) {
        if (K_NORM || unit < Key::Cut::turned) {
          u32 w[2][words<Model, VK>];
          packed<Model>(rows, item, u, j, x, w);
          store_unit<Model, Key::Cut, VK, VK * Model::size>(rows.row(u), unit, w);
        }
      }
      if constexpr (STORE) {
        if (slot < 0) continue;
        char* to = key_row(p, slot, head);
        if constexpr (K_SCALE) {
          scale_by<VK>(x[0], inverse[u]);
          scale_by<VK>(x[1], inverse[u]);
        }
        u32 w[2][words<KPool, VK>];
        packed<KPool>(rows, item, u, j, x, w);
        store_vector<KPool, VK, K_GROUP, K_POOL_ALIGN>(to, p.k_dim_group, Key::Cut::first(unit), w[0]);
        if (Key::Cut::has_second(unit))
          store_vector<KPool, VK, K_GROUP, K_POOL_ALIGN>(to, p.k_dim_group, Key::Cut::second(unit), w[1]);
        if constexpr (MERGED) store_value<Key::Cut, VK>(p, slot, head, unit, values.w[u][j], value_inverse[u]);
      }
    }
  }
}

// The work of a thread that takes queries, keys, or both: then position, slot and angles are read once
// for all of them.
template <bool QUERIES, bool KEYS> DEVICE void run_turned(const Params& p, i64 first, int block) {
  using Kind = typename Either<QUERIES, Query, Key>::type;
  constexpr bool stores = KEYS && STORE, values_too = KEYS && MERGED;
  constexpr bool reduces = (QUERIES && Q_NORM) || (KEYS && K_NORM);
  const Item item = item_of<Kind::team, Kind::lanes>(p, first, block);
  if (!reduces && !item.active) return;
  const float eps = __uint_as_float(u32(p.norm_eps));
  Rows<Query> queries;
  Rows<Key> keys;
  Rows<MergedValue> values;
  if constexpr (QUERIES) queries = Rows<Query>::at(p.q, p.q_token, p.q_head, item);
  if constexpr (KEYS) keys = Rows<Key>::at(p.k, p.k_token, p.k_head, item);
  if constexpr (values_too) values = Rows<MergedValue>::at(p.v, p.v_token, p.v_head, item);

  Place guess = {};
  Angles<Kind::width> angles[Kind::columns];
  if constexpr (EARLY) {
    // First, since the angles wait for it.
    if constexpr (R > 0) guess = place_of<true>(p, item.token, item.active);
    if constexpr (stores) {
      if (item.active) prefetch_slot(p, item.token);
    }
    if constexpr (KEYS) keys.fetch_early(item);
    if constexpr (values_too) values.fetch_early(item);
    if constexpr (QUERIES) queries.fetch_early(item);
    if constexpr (KEYS) prefetch_constants<K_SCALE, HK, K_NORM ? D * KNorm::size : 0>(p.k_scale, p.k_norm, item);
    if constexpr (values_too) prefetch_constants<V_SCALE, HK, 0>(p.v_scale, nullptr, item);
    if constexpr (QUERIES) prefetch_constants<Q_SCALE, HQ, Q_NORM ? D * QNorm::size : 0>(p.q_scale, p.q_norm, item);
    if constexpr (R > 0) {
      if (item.unit < Kind::Cut::turned) prefetch_angles<Kind::width>(p, guess, item.unit);
    }
  }
  wait_for_previous_kernel();

  // Everything is asked for here, before the first use.
  Place place = {};
  place.valid = item.active;
  if constexpr (R > 0) place = place_of<false>(p, item.token, item.active);
  i64 entry = -1;
  if constexpr (stores) {
    if (item.active) entry = load_index<SlotInt, false>(p.slots, item.token);
  }
  if constexpr (KEYS) keys.load(item);
  if constexpr (values_too) values.load(item);
  if constexpr (QUERIES) queries.load(item);
  float q_scale[UQ], k_scale[UK], v_scale[UK];
  if constexpr (QUERIES) load_scales<Query, Q_SCALE>(p.q_scale, item, q_scale);
  if constexpr (KEYS) load_scales<Key, K_SCALE>(p.k_scale, item, k_scale);
  if constexpr (values_too) load_scales<Key, V_SCALE>(p.v_scale, item, v_scale);
  RmsNorm<Query> q_norm;
  RmsNorm<Key> k_norm;
  if constexpr (QUERIES && Q_NORM) q_norm.load(p.q_norm, item);
  if constexpr (KEYS && K_NORM && !QUERIES) k_norm.load(p.k_norm, item);
  if constexpr (R > 0) load_turns<Kind>(p, EARLY ? guess : place, item, angles);
  if constexpr (R > 0 && EARLY) {
    if (!same_place(guess, place)) load_turns<Kind>(p, place, item, angles);
  }
  i64 slot = -1;
  if constexpr (stores) slot = slot_of(p, entry);

  if constexpr (QUERIES && Q_NORM) q_norm.sum(queries, eps);
  if constexpr (KEYS && K_NORM) k_norm.sum(keys, eps);
  if (!place.valid) return;
  if constexpr (QUERIES) {
    invert<Q_SCALE, UQ>(q_scale);
    store_queries(p, item, queries, q_norm, angles, q_scale);
  }
  if constexpr (KEYS) {
    if (!WRITE_K && slot < 0) return;
    if constexpr (K_NORM && QUERIES) k_norm.load(p.k_norm, item);
    invert<K_SCALE, UK>(k_scale);
    if constexpr (values_too) invert<V_SCALE, UK>(v_scale);
    store_keys(p, item, slot, keys, k_norm, angles, k_scale, values, v_scale);
  }
}
