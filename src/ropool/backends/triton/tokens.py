# mypy: disable-error-code="no-untyped-def"
"""What a program knows of its tokens: position, cos and sin, and the slot that they go to.

All of it is int64 once loaded; a masked-out token reads nothing.
"""

import triton
import triton.language as tl


@triton.jit
def token_block(first, tokens, BLOCK: tl.constexpr):
    """Token indices `[BLOCK]` from `first` (int64) on, and which exist."""
    token = first + tl.arange(0, BLOCK)
    return token, token < tokens


@triton.jit
def position(positions, offset, token, exists, stream_stride, max_position):
    """Positions of one stream, and which lie in the table."""
    where = tl.load(positions + stream_stride + token, mask=exists, other=-1).to(tl.int64) + offset
    return where, exists & (where >= 0) & (where < max_position)


@triton.jit
def token_positions(
    positions, offsets, token, exists, position_row, max_position, STREAMS: tl.constexpr
):
    """Positions of the streams (three with M-RoPE; otherwise all the same), and which tokens have
    all of theirs in the table."""
    offset = tl.zeros([1], tl.int64)
    if offsets is not None:
        offset = tl.load(offsets + token, mask=exists, other=0).to(tl.int64)
    first, inside = position(positions, offset, token, exists, 0, max_position)
    second, third = first, first
    if STREAMS == 3:
        row = tl.zeros([1], tl.int64) + position_row
        second, inside_2 = position(positions, offset, token, exists, row, max_position)
        third, inside_3 = position(positions, offset, token, exists, 2 * row, max_position)
        inside = inside & inside_2 & inside_3
    return first, second, third, inside


@triton.jit
def cos_sin(
    table, table_row, first, second, third, inside,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, STREAMS: tl.constexpr,
    MROPE_T: tl.constexpr, MROPE_H: tl.constexpr, MROPE_W: tl.constexpr,
    MROPE_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """cos and sin `[tokens, 1, HALF_BLOCK]`, as they are stored."""
    frequency = tl.arange(0, HALF_BLOCK)[None, :]
    where = first[:, None]
    if STREAMS == 3:
        if MROPE_INTERLEAVED:
            is_second = (frequency % 3 == 1) & (frequency < 3 * MROPE_H)
            is_third = (frequency % 3 == 2) & (frequency < 3 * MROPE_W)
        else:
            is_second = (frequency >= MROPE_T) & (frequency < MROPE_T + MROPE_H)
            is_third = frequency >= MROPE_T + MROPE_H
        where = tl.where(is_second, second[:, None], where)
        where = tl.where(is_third, third[:, None], where)
    address = table + where * table_row + frequency
    mask = inside[:, None] & (frequency < HALF)
    cos = tl.load(address, mask=mask, other=0.0)
    sin = tl.load(address + HALF, mask=mask, other=0.0)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def target_slots(
    slot_mapping, window_map, token, exists, pool_slots, window_size, padding_slot,
    HAS_PADDING_SLOT: tl.constexpr,
):  # fmt: skip
    """The pool slot of each token (0 where it is not written), and which are written."""
    slot = tl.load(slot_mapping + token, mask=exists, other=-1).to(tl.int64)
    written = slot >= 0
    if HAS_PADDING_SLOT:
        written = written & (slot != padding_slot)
    if window_map is not None:
        written = written & (slot < window_size)
        slot = tl.load(window_map + slot, mask=written, other=-1).to(tl.int64)
        written = written & (slot >= 0)
    written = written & (slot < pool_slots)
    return tl.where(written, slot, 0), written


@triton.jit
def slot_offsets(
    slot, page_stride, row_group_stride, row_stride,
    PAGE_SIZE: tl.constexpr, ROW_GROUP: tl.constexpr,
):  # fmt: skip
    """Where each slot's row starts in a pool tensor; see `ropool.layouts.PlaneView`."""
    page = slot // PAGE_SIZE
    row = slot % PAGE_SIZE
    start = page * page_stride
    if PAGE_SIZE > 1:
        if ROW_GROUP == 1:
            start += row * row_group_stride
        elif ROW_GROUP >= PAGE_SIZE:
            start += row * row_stride
        else:
            start += row // ROW_GROUP * row_group_stride + row % ROW_GROUP * row_stride
    return start
