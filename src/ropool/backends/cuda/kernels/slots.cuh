// Where a token's row stands in the pool. Strides of pools are in bytes.

// The slot that an entry of the slot mapping stands for, or -1: padding, or outside of the map or the
// pool.
DEVICE i64 slot_of(const Params& p, i64 entry) {
  bool written = !HAS_PADDING || entry != p.padding_slot;
  if constexpr (HAS_WINDOW) {
    written = written && u64(entry) < u64(p.window_size);
    if (written) entry = load_index<WindowInt, false>(p.window, entry);
  }
  return written && u64(entry) < u64(p.pool_slots) ? entry : -1;
}

// Bring the entries of a token's slot into L2.
DEVICE void prefetch_slot(const Params& p, i64 token) {
  if constexpr (HAS_WINDOW) {
    const i64 entry = load_index<SlotInt, true>(p.slots, token);
    if (entry >= 0 && entry < p.window_size) prefetch(p.window + entry * i64(sizeof(WindowInt)));
  } else
    prefetch(p.slots + token * i64(sizeof(SlotInt)));
}

template <int ROW_GROUP>
DEVICE i64 slot_offset(i64 slot, i64 page_stride, i64 group_stride, i64 row_stride) {
  const u64 page = u64(slot) / PAGE;
  const u32 row = u32(u64(slot) % PAGE);
  i64 offset = i64(page) * page_stride;
  if constexpr (PAGE > 1) offset += row / ROW_GROUP * group_stride + row % ROW_GROUP * row_stride;
  return offset;
}

DEVICE char* value_row(const Params& p, i64 slot, int head) {
  return p.v_pool + V_POOL_OFFSET + head * p.v_plane +
         slot_offset<V_ROW_GROUP>(slot, p.v_page, p.v_row_group, p.v_row);
}

DEVICE char* key_row(const Params& p, i64 slot, int head) {
  return p.k_pool + K_POOL_OFFSET + head * p.k_plane +
         slot_offset<K_ROW_GROUP>(slot, p.k_page, p.k_row_group, p.k_row);
}
