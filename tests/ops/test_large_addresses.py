"""Tensors whose rows stand further apart than 32 bits reach, in bytes and in elements.

The tensors live in one large mapping of which only touched pages take memory. After a call the
pages that came into being are read back, so a write that wrapped to anywhere in it is seen.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import FP8, Args, Case, arguments
from ops.memory import compacted
from oracle import compare, expected

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/pagemap")

PAGE = mmap.PAGESIZE
NO_RESERVE = 0x4000  # MAP_NORESERVE, which mmap names from Python 3.13 on
GIB = 2**30


class Space:
    """`size` bytes of zeros that exist only where something was written."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        self.map = mmap.mmap(-1, size, flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def view(self, shape: Any, strides: Any, dtype: torch.dtype, offset: int) -> torch.Tensor:
        """A tensor in the mapping; strides and offset in elements of `dtype`."""
        return self.bytes.view(dtype).as_strided(tuple(shape), tuple(strides), offset)

    def written_bytes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where a byte is not zero."""
        first = self.bytes.data_ptr() // PAGE
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(first * 8)
            entries = np.frombuffer(file.read(len(self.bytes) // PAGE * 8), dtype=np.uint64)
        places = []
        for page in np.flatnonzero(entries >> np.uint64(62)):
            data = self.bytes[int(page) * PAGE : (int(page) + 1) * PAGE].numpy()
            places.append(np.flatnonzero(data) + int(page) * PAGE)
        return np.concatenate(places) if places else np.zeros(0, np.int64)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The place of every byte of a view in its storage."""
    offsets: Any = np.zeros((), np.int64) + int(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size, dtype=np.int64) * stride
    size = tensor.element_size()
    return (offsets.reshape(-1, 1) * size + np.arange(size)).reshape(-1)


@pytest.fixture
def space(backend: Backend) -> Iterator[Space]:
    if backend.device != "cpu":
        pytest.skip("large allocations of other devices are tested on their machines")
    yield Space(42 * GIB)


def run(op: str, args: Args, far: dict[str, torch.Tensor], space: Space, backend: Backend) -> None:
    """Run with the arguments named in `far` moved into the mapping."""
    for name, view in far.items():
        view.copy_(args[name])
    before = {**args, **{name: args[name].clone() for name in far}}
    for name in ("k_pool", "v_pool", "pool"):
        # Zero, so that every byte that is not zero was written by the call.
        if name in far:
            before[name].zero_()
            far[name].zero_()
    plain = compacted(before)
    after = {**compacted(args), **far}
    getattr(ropool, op)(**after, backend=backend.name)
    compare(plain, compacted(after), expected(op, plain))
    inside = np.concatenate([_bytes_of(view) for view in far.values()])
    stray = np.setdiff1d(space.written_bytes(), inside)
    assert len(stray) == 0, f"{len(stray)} bytes written outside the views, first at {stray[0]:#x}"


# Steps between rows: nine of them pass 2**31 and 2**32 elements, and are no power of two.
STEP = 2**30 + 1200


def _far(
    shape: Any, dtype: torch.dtype, space: Space, far_dim: int, start: int, step: int
) -> torch.Tensor:
    """A dense view but for `far_dim`, whose stride is `step` elements.

    It begins well inside the mapping: an offset that wraps to a negative one lands there.
    """
    strides, extent = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        strides[dim] = step if dim == far_dim else extent
        extent *= 1 if dim == far_dim else shape[dim]
    assert extent + start < step
    return space.view(shape, strides, dtype, start + 8 * GIB // dtype.itemsize)


@pytest.mark.parametrize("layout", ["NHD", "HND", "slots", "x_packed", "shuffled"])
@pytest.mark.parametrize("stored", ["model", *FP8])
@pytest.mark.parametrize("op", ["store_kv_", "rope_store_kv_"])
def test_pool_pages_past_32_bits(
    op: str, layout: str, stored: str, space: Space, backend: Backend
) -> None:
    pages = 9
    case = Case(
        op=op,
        layout=layout,
        pool_dtype=stored,
        pages=pages,
        page_size=8,
        tokens=9,
        head_dim=16,
        k_scale="head",
    )
    args = arguments(case)
    rows = 1 if layout == "slots" else 8
    args["slot_mapping"] = torch.arange(pages) * rows + rows // 2
    far = {
        name: _far(args[name].shape, args[name].dtype, space, 0, 64 + place, STEP)
        for name, place in (("k_pool", 0), ("v_pool", 2**20))
    }
    run(op, args, far, space, backend)


@pytest.mark.parametrize("far_dim", [1, 2])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pool_rows_and_heads_past_32_bits(
    layout: str, far_dim: int, space: Space, backend: Backend
) -> None:
    case = Case(layout=layout, page_size=5, pages=1, heads_kv=5, heads_q=5, tokens=5, head_dim=16)
    args = arguments(case)
    far = {
        name: _far(args[name].shape, args[name].dtype, space, far_dim, 64 + place, STEP)
        for name, place in (("k_pool", 0), ("v_pool", 2**20))
    }
    run(case.op, args, far, space, backend)


@pytest.mark.parametrize("op", ["store_mla_", "rope_store_mla_"])
@pytest.mark.parametrize("row_format", ["model", "fp8", "fp8_ds_mla"])
@pytest.mark.parametrize("paged", [False, True])
def test_mla_rows_past_32_bits(
    op: str, row_format: str, paged: bool, space: Space, backend: Backend
) -> None:
    case = Case(
        op=op,
        row_format=row_format,
        pool_dtype=FP8[0],
        paged=paged,
        pages=9,
        page_size=2,
        tokens=9,
        head_dim=64,
    )
    args = arguments(case)
    args["slot_mapping"] = torch.arange(9) * (2 if paged else 1)
    pool = args["pool"]
    run(op, args, {"pool": _far(pool.shape, pool.dtype, space, 0, 67, STEP + 1)}, space, backend)


@pytest.mark.parametrize("op", ["rope_", "rope_store_kv_"])
@pytest.mark.parametrize("far_dim", [0, 1])
def test_heads_and_tokens_past_32_bits(
    op: str, far_dim: int, space: Space, backend: Backend
) -> None:
    """The QKV offset of a long prefill: tokens, or heads, more than 2**31 elements apart."""
    case = Case(op=op, tokens=5, heads_q=5, heads_kv=5, head_dim=16, write_k=True)
    args = arguments(case)
    names = [name for name in ("q", "k", "v") if name in args]
    far: dict[str, torch.Tensor] = {
        name: _far(args[name].shape, args[name].dtype, space, far_dim, 64 + place * 2**20, STEP)
        for place, name in enumerate(names)
    }
    run(op, args, far, space, backend)


def test_q_out_past_32_bits(space: Space, backend: Backend) -> None:
    case = Case(tokens=9, q_out=FP8[0], q_scale="head")
    args = arguments(case)
    q_out = args["q_out"]
    run(
        case.op, args, {"q_out": _far(q_out.shape, q_out.dtype, space, 0, 64, STEP)}, space, backend
    )


def test_mla_inputs_past_32_bits(space: Space, backend: Backend) -> None:
    case = Case(op="rope_store_mla_", tokens=9, head_dim=64, write_k=True)
    args = arguments(case)
    far = {
        name: _far(args[name].shape, args[name].dtype, space, 0, 64 + place * 2**20, STEP)
        for place, name in enumerate(("q_rope", "k_nope", "k_rope"))
    }
    run(case.op, args, far, space, backend)


def test_table_rows_past_32_bits(space: Space, backend: Backend) -> None:
    case = Case(tokens=9, max_position=9, head_dim=16, mrope="sectioned")
    args = arguments(case)
    args["positions"] = torch.arange(9).expand(3, 9).clone()
    args["mrope_section"] = (4, 2, 2)
    table = args["cos_sin_cache"]
    step = STEP // 2
    far = {"cos_sin_cache": _far(table.shape, table.dtype, space, 0, 64, step)}
    run(case.op, args, far, space, backend)


def test_positions_past_32_bits(space: Space, backend: Backend) -> None:
    """The three rows of M-RoPE positions far apart."""
    case = Case(tokens=5, mrope="interleaved", head_dim=16)
    args = arguments(case)
    positions = args["positions"]
    far = {"positions": _far(positions.shape, positions.dtype, space, 0, 64, STEP)}
    run(case.op, args, far, space, backend)
