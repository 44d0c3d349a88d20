# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 (a condition on constants must stand alone to be decided at compile time)
"""The one kernel behind all five ops; what a key does not need is compiled out.

Layout of the work: the programs of a group of tokens stand side by side, each with a role. The
first ones rotate a block of query heads each, the next ones rotate and store a block of key heads,
the last ones store a block of value heads; an MLA row is one key head (the rope part) and one value
head (the latent). A program reads the cos/sin row of a token once for all its heads, and starts
every load of its heads before it waits for a position or a slot, so that memory latency is paid
once. Roles differ in their variables' names, since a name has one type in a whole kernel.

Byte floor of a token: each of Q, K, V read once, Q written once, the pool rows written once, a
cos/sin row; the table rows read again by the other roles of a token come from the caches.
"""

import triton
import triton.language as tl

from ropool.backends.triton.heads import (
    head_block,
    head_starts,
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
    """Load, normalise and rotate a block of heads: both dims of the pairs, the rest (the
    first dims again with `REST_BLOCK` 0, unused), and which tokens stand in the table."""
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
    Q_TOKENS: tl.constexpr, K_TOKENS: tl.constexpr, V_TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr,
    Q_ROLES: tl.constexpr, K_ROLES: tl.constexpr, V_ROLES: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
):  # fmt: skip
    # Programs of a group: `X_ROLES` blocks of heads for each `X_TOKENS` of its tokens.
    Q_PROGRAMS: tl.constexpr = Q_ROLES * (GROUP_TOKENS // Q_TOKENS)
    K_PROGRAMS: tl.constexpr = K_ROLES * (GROUP_TOKENS // K_TOKENS)
    V_PROGRAMS: tl.constexpr = V_ROLES * (GROUP_TOKENS // V_TOKENS)
    PROGRAMS: tl.constexpr = Q_PROGRAMS + K_PROGRAMS + V_PROGRAMS
    role = tl.program_id(0) % PROGRAMS
    first_token = (tl.program_id(0) // PROGRAMS).to(tl.int64) * GROUP_TOKENS

    if Q_PROGRAMS > 0:
        if role < Q_PROGRAMS:
            first_q_token = first_token + role // Q_ROLES * Q_TOKENS
            token_q, exists_q = token_block(first_q_token, tokens, Q_TOKENS)
            head_q, is_head_q = head_block(role % Q_ROLES * Q_HEADS, HEADS_Q, Q_HEADS)
            here_q = exists_q[:, None] & is_head_q
            start_q = head_starts(token_q, head_q, q_token, q_head)
            # In place, dims that nothing changes are neither read nor written.
            REST_Q: tl.constexpr = REST_BLOCK if q_weight is not None or q_out is not None else 0
            first_q, second_q, rest_q, valid_q = rotated_heads(
                q, start_q, here_q, q_weight, norm_eps, table, table_row,
                positions, offsets, position_row, token_q, exists_q, max_position,
                HEAD_DIM, HALF, HALF_BLOCK, REST_Q, INTERLEAVED, STREAMS,
                MROPE_T, MROPE_H, MROPE_W, MROPE_INTERLEAVED, NATIVE,
            )  # fmt: skip
            mask_q = (here_q & valid_q[:, None])[:, :, None]
            scale_q = load_scale(q_scale, head_q, is_head_q, Q_SCALE)
            target = q
            if q_out is not None:
                target = q_out
                start_q = head_starts(token_q, head_q, out_token, out_head)
            store_heads(
                target, start_q, mask_q, first_q, second_q, rest_q, scale_q, 0,
                HALF, HEAD_DIM, INTERLEAVED, REST_Q > 0, HEAD_DIM, Q_FORMAT, NATIVE, NATIVE_FP8,
            )  # fmt: skip

    if K_PROGRAMS > 0:
        if (role >= Q_PROGRAMS) & (role < Q_PROGRAMS + K_PROGRAMS):
            role_k = role - Q_PROGRAMS
            first_k_token = first_token + role_k // K_ROLES * K_TOKENS
            token_k, exists_k = token_block(first_k_token, tokens, K_TOKENS)
            head_k, is_head_k = head_block(role_k % K_ROLES * K_HEADS, HEADS_KV, K_HEADS)
            here_k = exists_k[:, None] & is_head_k
            start_k = head_starts(token_k, head_k, k_token, k_head)
            valid_k = exists_k
            if HALF > 0:
                REST_K: tl.constexpr = (
                    REST_BLOCK if k_weight is not None or k_pool is not None else 0
                )
                first_k, second_k, rest_k, valid_k = rotated_heads(
                    k, start_k, here_k, k_weight, norm_eps, table, table_row,
                    positions, offsets, position_row, token_k, exists_k, max_position,
                    HEAD_DIM, HALF, HALF_BLOCK, REST_K, INTERLEAVED, STREAMS,
                    MROPE_T, MROPE_H, MROPE_W, MROPE_INTERLEAVED, NATIVE,
                )  # fmt: skip
                if WRITE_K:
                    back_k = (here_k & valid_k[:, None])[:, :, None]
                    store_heads(
                        k, start_k, back_k, first_k, second_k, rest_k, None, 0,
                        HALF, HEAD_DIM, INTERLEAVED, REST_BLOCK > 0 and k_weight is not None,
                        HEAD_DIM, K_FORMAT, NATIVE, NATIVE_FP8,
                    )  # fmt: skip
            else:
                whole_k = load_dims(k, start_k, here_k[:, :, None], 0, HEAD_DIM, HEAD_BLOCK)
            if k_pool is not None:
                slot_k, written_k = target_slots(
                    slot_mapping, window_map, token_k, exists_k,
                    pool_slots, window_size, padding_slot, HAS_PADDING_SLOT,
                )  # fmt: skip
                row_k = slot_offsets(slot_k, k_page, k_row_group, k_row, PAGE_SIZE, K_ROW_GROUP)
                place_k = head_starts(row_k, head_k, 1, k_plane_head) + K_FIRST
                mask_k = (here_k & (valid_k & written_k)[:, None])[:, :, None]
                scale_k = load_scale(k_scale, head_k, is_head_k, K_SCALE)
                if HALF > 0:
                    store_heads(
                        k_pool, place_k, mask_k, first_k, second_k, rest_k, scale_k, k_dim_group,
                        HALF, HEAD_DIM, INTERLEAVED, REST_BLOCK > 0, K_DIM_GROUP, POOL_FORMAT_K,
                        NATIVE, NATIVE_FP8,
                    )  # fmt: skip
                else:
                    store_dims(
                        k_pool, place_k, mask_k, whole_k, scale_k, k_dim_group,
                        0, HEAD_DIM, HEAD_DIM, K_DIM_GROUP, POOL_FORMAT_K, NATIVE, NATIVE_FP8,
                    )  # fmt: skip

    if V_PROGRAMS > 0:
        if role >= Q_PROGRAMS + K_PROGRAMS:
            role_v = role - Q_PROGRAMS - K_PROGRAMS
            first_v_token = first_token + role_v // V_ROLES * V_TOKENS
            token_v, exists_v = token_block(first_v_token, tokens, V_TOKENS)
            head_v, is_head_v = head_block(role_v % V_ROLES * V_HEADS, HEADS_KV, V_HEADS)
            here_v = exists_v[:, None] & is_head_v
            start_v = head_starts(token_v, head_v, v_token, v_head)
            whole_v = load_dims(v, start_v, here_v[:, :, None], 0, V_HEAD_DIM, V_BLOCK)
            valid_v = exists_v
            if positions is not None:
                # A token whose position is out of range is dropped whole.
                _, _, _, valid_v = token_positions(
                    positions, offsets, token_v, exists_v, position_row, max_position, STREAMS
                )
            slot_v, written_v = target_slots(
                slot_mapping, window_map, token_v, exists_v,
                pool_slots, window_size, padding_slot, HAS_PADDING_SLOT,
            )  # fmt: skip
            row_v = slot_offsets(slot_v, v_page, v_row_group, v_row, PAGE_SIZE, V_ROW_GROUP)
            place_v = head_starts(row_v, head_v, 1, v_plane_head)
            mask_v = (here_v & (valid_v & written_v)[:, None])[:, :, None]
            if POOL_FORMAT_V == "fp8_ds_mla":
                store_latent_tiles(v_pool, place_v, mask_v, whole_v, NATIVE, NATIVE_FP8)
            else:
                scale_v = load_scale(v_scale, head_v, is_head_v, V_SCALE)
                store_dims(
                    v_pool, place_v, mask_v, whole_v, scale_v, v_dim_group,
                    0, V_HEAD_DIM, V_HEAD_DIM, V_DIM_GROUP, POOL_FORMAT_V, NATIVE, NATIVE_FP8,
                )  # fmt: skip
