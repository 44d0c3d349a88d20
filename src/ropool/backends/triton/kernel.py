# mypy: disable-error-code="no-untyped-def"
"""The one kernel behind all five ops; what a key does not need is compiled out.

Layout of the work: program `(i, r)` serves block `i` of tokens and role `r`. The first roles each
rotate a block of query heads, the next ones a block of key heads (and store them), the last ones
store a block of value heads; an MLA row is one key head (rope part) and one value head (latent).
A program reads the cos/sin row of a token once for all its heads, and starts every load of its
heads before it waits for a position or a slot, so that one memory latency is paid, not three.

Byte floor of a token: each of Q, K, V read once, Q written once, the pool rows written once, a
cos/sin row; the table rows read again by the other roles of a token come from the caches.
"""

import triton
import triton.language as tl

from ropool.backends.triton.heads import (
    head_block,
    load_dims,
    load_pairs,
    load_scale,
    rms_normalise,
    rotate,
    store_dims,
    store_heads,
    store_latent_tiles,
)
from ropool.backends.triton.rounding import widen
from ropool.backends.triton.tokens import (
    cos_sin,
    slot_offsets,
    target_slots,
    token_block,
    token_positions,
)


@triton.jit
def rotated_heads(
    x, start, here, weight, norm_eps, table, table_row,
    positions, offsets, position_row, token, exists, max_position,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, STREAMS: tl.constexpr,
    MROPE_T: tl.constexpr, MROPE_H: tl.constexpr, MROPE_W: tl.constexpr,
    MROPE_INTERLEAVED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Load, normalise and rotate a block of heads: both dims of the pairs, the rest (a placeholder
    with `REST_BLOCK` 0), and which tokens stand in the table."""
    mask = here[:, :, None]
    first, second = load_pairs(x, start, mask, HALF, HALF_BLOCK, INTERLEAVED)
    rest = first
    if REST_BLOCK > 0:
        rest = load_dims(x, start, mask, 2 * HALF, HEAD_DIM - 2 * HALF, REST_BLOCK)
    p0, p1, p2, valid = token_positions(
        positions, offsets, token, exists, position_row, max_position, STREAMS
    )
    cos, sin = cos_sin(
        table, table_row, p0, p1, p2, valid, HALF, HALF_BLOCK, STREAMS,
        MROPE_T, MROPE_H, MROPE_W, MROPE_INTERLEAVED,
    )  # fmt: skip
    first = widen(first, NATIVE)
    second = widen(second, NATIVE)
    if weight is not None:
        if REST_BLOCK > 0:
            rest = widen(rest, NATIVE)
        first, second, rest = rms_normalise(
            first, second, rest, weight, norm_eps,
            HALF, HALF_BLOCK, HEAD_DIM, REST_BLOCK, INTERLEAVED, NATIVE,
        )  # fmt: skip
    first, second = rotate(first, second, widen(cos, NATIVE), widen(sin, NATIVE))
    return first, second, rest, valid


@triton.jit
def heads_kernel(
    q, k, v, q_out, k_pool, v_pool, table, positions, offsets, slot_mapping, window_map,
    q_weight, k_weight, q_scale, k_scale, v_scale,
    tokens, max_position, pool_slots, window_size, padding_slot, norm_eps,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    table_row, position_row,
    k_page, k_plane_head, k_row_group, k_row, k_dim_group,
    v_page, v_plane_head, v_row_group, v_row, v_dim_group,
    HEADS_Q: tl.constexpr, HEADS_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, STREAMS: tl.constexpr, MROPE_T: tl.constexpr,
    MROPE_H: tl.constexpr, MROPE_W: tl.constexpr, MROPE_INTERLEAVED: tl.constexpr,
    Q_FORMAT: tl.constexpr, K_FORMAT: tl.constexpr, POOL_FORMAT_K: tl.constexpr,
    POOL_FORMAT_V: tl.constexpr, Q_SCALE: tl.constexpr, K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, WRITE_K: tl.constexpr, HAS_PADDING_SLOT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, K_ROW_GROUP: tl.constexpr, V_ROW_GROUP: tl.constexpr,
    K_DIM_GROUP: tl.constexpr, V_DIM_GROUP: tl.constexpr, K_FIRST: tl.constexpr,
    NATIVE: tl.constexpr, NATIVE_FP8: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    Q_ROLES: tl.constexpr, K_ROLES: tl.constexpr,
):  # fmt: skip
    role = tl.program_id(1)
    token, exists = token_block(tokens, TOKEN_BLOCK)

    if role < Q_ROLES:
        head, is_head = head_block(role * Q_BLOCK, HEADS_Q, Q_BLOCK)
        here = exists[:, None] & is_head
        start = (token[:, None] * q_token + head.to(tl.int64) * q_head)[:, :, None]
        # In place, dims that nothing changes are neither read nor written.
        WITH_REST: tl.constexpr = REST_BLOCK > 0 and (q_weight is not None or q_out is not None)
        first, second, rest, valid = rotated_heads(
            q, start, here, q_weight, norm_eps, table, table_row,
            positions, offsets, position_row, token, exists, max_position,
            HEAD_DIM, HALF, HALF_BLOCK, REST_BLOCK if WITH_REST else 0, INTERLEAVED, STREAMS,
            MROPE_T, MROPE_H, MROPE_W, MROPE_INTERLEAVED, NATIVE,
        )  # fmt: skip
        mask = (here & valid[:, None])[:, :, None]
        scale = load_scale(q_scale, head, is_head, Q_SCALE)
        target = q
        if q_out is not None:
            target = q_out
            start = (token[:, None] * out_token + head.to(tl.int64) * out_head)[:, :, None]
        store_heads(
            target, start, mask, first, second, rest, scale, 0,
            HALF, HEAD_DIM, INTERLEAVED, WITH_REST, HEAD_DIM, Q_FORMAT, NATIVE, NATIVE_FP8,
        )  # fmt: skip

    elif role < Q_ROLES + K_ROLES:
        head, is_head = head_block((role - Q_ROLES) * KV_BLOCK, HEADS_KV, KV_BLOCK)
        here = exists[:, None] & is_head
        source = (token[:, None] * k_token + head.to(tl.int64) * k_head)[:, :, None]
        valid = exists
        if HALF > 0:
            WITH_K_REST: tl.constexpr = REST_BLOCK > 0 and (
                k_weight is not None or k_pool is not None
            )
            first, second, rest, valid = rotated_heads(
                k, source, here, k_weight, norm_eps, table, table_row,
                positions, offsets, position_row, token, exists, max_position,
                HEAD_DIM, HALF, HALF_BLOCK, REST_BLOCK if WITH_K_REST else 0, INTERLEAVED, STREAMS,
                MROPE_T, MROPE_H, MROPE_W, MROPE_INTERLEAVED, NATIVE,
            )  # fmt: skip
            if WRITE_K:
                store_heads(
                    k, source, (here & valid[:, None])[:, :, None], first, second, rest, None, 0,
                    HALF, HEAD_DIM, INTERLEAVED, REST_BLOCK > 0 and k_weight is not None,
                    HEAD_DIM, K_FORMAT, NATIVE, NATIVE_FP8,
                )  # fmt: skip
        else:
            whole = load_dims(k, source, here[:, :, None], 0, HEAD_DIM, HEAD_BLOCK)
        if k_pool is not None:
            slot, written = target_slots(
                slot_mapping, window_map, token, exists, pool_slots, window_size, padding_slot,
                HAS_PADDING_SLOT,
            )  # fmt: skip
            row = slot_offsets(slot, k_page, k_row_group, k_row, PAGE_SIZE, K_ROW_GROUP)
            start = (row[:, None] + head.to(tl.int64) * k_plane_head)[:, :, None] + K_FIRST
            mask = (here & (valid & written)[:, None])[:, :, None]
            scale = load_scale(k_scale, head, is_head, K_SCALE)
            if HALF > 0:
                store_heads(
                    k_pool, start, mask, first, second, rest, scale, k_dim_group,
                    HALF, HEAD_DIM, INTERLEAVED, REST_BLOCK > 0, K_DIM_GROUP, POOL_FORMAT_K,
                    NATIVE, NATIVE_FP8,
                )  # fmt: skip
            else:
                store_dims(
                    k_pool, start, mask, whole, scale, k_dim_group,
                    0, HEAD_DIM, HEAD_DIM, K_DIM_GROUP, POOL_FORMAT_K, NATIVE, NATIVE_FP8,
                )  # fmt: skip

    elif v_pool is not None:
        head, is_head = head_block((role - Q_ROLES - K_ROLES) * KV_BLOCK, HEADS_KV, KV_BLOCK)
        here = exists[:, None] & is_head
        start = (token[:, None] * v_token + head.to(tl.int64) * v_head)[:, :, None]
        whole = load_dims(v, start, here[:, :, None], 0, V_HEAD_DIM, V_BLOCK)
        valid = exists
        if positions is not None:
            # A token whose position is out of range is dropped whole.
            _, _, _, valid = token_positions(
                positions, offsets, token, exists, position_row, max_position, STREAMS
            )
        slot, written = target_slots(
            slot_mapping, window_map, token, exists, pool_slots, window_size, padding_slot,
            HAS_PADDING_SLOT,
        )  # fmt: skip
        row = slot_offsets(slot, v_page, v_row_group, v_row, PAGE_SIZE, V_ROW_GROUP)
        start = (row[:, None] + head.to(tl.int64) * v_plane_head)[:, :, None]
        mask = (here & (valid & written)[:, None])[:, :, None]
        if POOL_FORMAT_V == "fp8_ds_mla":
            store_latent_tiles(v_pool, start, mask, whole, NATIVE, NATIVE_FP8)
        else:
            store_dims(
                v_pool, start, mask, whole, load_scale(v_scale, head, is_head, V_SCALE),
                v_dim_group, 0, V_HEAD_DIM, V_HEAD_DIM, V_DIM_GROUP, POOL_FORMAT_V,
                NATIVE, NATIVE_FP8,
            )  # fmt: skip
