// Rows that are stored as they came, moved by the bulk copy engine (sm_90 and later): a thread a token.
// It names the token's value (or latent) part and key (or rope) part to the engine, which brings both
// into shared memory, and then their places in the pool, which the engine writes. No register holds
// data, so that few threads keep many rows in flight.
//
// Byte floor: each part read and written, once.

constexpr int VALUE_BYTES = HV * DV * Model::size, KEY_BYTES = HK * D * Model::size;
constexpr int BYTES = VALUE_BYTES + KEY_BYTES;

DEVICE u32 shared_address(const void* at) { return u32(__cvta_generic_to_shared(at)); }

DEVICE void prefetch_bulk(const char* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

DEVICE void load_bulk(u32 to, const char* from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

DEVICE void store_bulk(char* to, u32 from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS) ropool_kernel(const __grid_constant__ Params p) {
  __shared__ alignas(128) char rows[THREADS][BYTES];
  __shared__ alignas(8) u64 barriers[THREADS];
  let_next_kernel_start();
  const u32 row = shared_address(rows[threadIdx.x]), barrier = shared_address(&barriers[threadIdx.x]);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
  // The engine must see the barriers that the block has set up; a block is no larger than a warp.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  const i64 token = i64(blockIdx.x) * THREADS + threadIdx.x;
  if (token >= p.tokens) return;
  const char* value = p.v + token * p.v_token * Model::size;
  const char* key = p.k + token * p.k_token * Model::size;
  if constexpr (EARLY) {
    prefetch_slot(p, token);
    prefetch_bulk(value, VALUE_BYTES);
    prefetch_bulk(key, KEY_BYTES);
  }
  wait_for_previous_kernel();
  const i64 entry = load_index<SlotInt, false>(p.slots, token);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(BYTES) : "memory");
  load_bulk(row, value, VALUE_BYTES, barrier);
  load_bulk(row + VALUE_BYTES, key, KEY_BYTES, barrier);
  const i64 slot = slot_of(p, entry);
  u32 complete = 0;
  while (!complete)
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], 0; selp.u32 %0, 1, 0, done; }"
        : "=r"(complete)
        : "r"(barrier)
        : "memory");
  if (slot < 0) return;
  if constexpr (JOINED) {
    store_bulk(value_row(p, slot, 0), row, BYTES);
  } else {
    store_bulk(value_row(p, slot, 0), row, VALUE_BYTES);
    store_bulk(key_row(p, slot, 0), row + VALUE_BYTES, KEY_BYTES);
  }
  // Shared memory lives until the write has been made, and the next kernel may read it then.
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
