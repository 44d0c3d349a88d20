"""Offsets past 2**32 bytes and 2**31 elements. An array of zeros of that size gives its pages back,
so that only one at a time takes memory, and only while it is made."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("ropool_metal")

from ropool_metal import rope_pool_fused, store_pool  # noqa: E402

from mlx_extension.device import use_device  # noqa: E402
from mlx_extension.oracle import bits, close  # noqa: E402

NEEDED = 6 * 2**30
"""Bytes of memory for the larger half of what is made here, and for the rest of a test run."""

SLOTS = 2**25 + 2**21
LAST = SLOTS - 1
WRAPPED = LAST % 2**25
"""The slot where an offset of 32 bits, counted in bytes, would end instead of in the last one."""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs pages that can be given back"),
    pytest.mark.skipif(use_device() != "cpu", reason="takes pages from under the GPU"),
]


class Large(NamedTuple):
    """K and V of `[SLOTS, 1, 64]` float16, zeros except for the last row, the first, and one
    between them."""

    k: Any
    v: Any


def zeros() -> Any:
    array = mx.zeros((SLOTS, 1, 64), mx.float16)
    mx.eval(array)
    address = int(np.array(array, copy=False).__array_interface__["data"][0])
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + array.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    assert libc.madvise(*arguments) == 0, ctypes.get_errno()
    return array


def rows(first: int, last: int, dtype: Any) -> tuple[Any, Any]:
    """Two rows of small whole numbers and the first two slots, as 64-bit integers."""
    small = mx.arange(2 * 64).reshape(2, 1, 64) % 17 - 5
    slots = mx.broadcast_to(mx.array([first, last], mx.int64)[:, None, None], (2, 1, 16))
    return small.astype(dtype), slots.view(dtype)


@pytest.fixture(scope="module")
def large() -> Iterator[Large]:
    available = psutil.virtual_memory().available
    if available < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of memory, {available / 2**30:.1f} are available")
    k, v = zeros(), zeros()
    k_rows, v_rows = rows(2, 5, mx.float16)
    k, v = store_pool(k_rows, v_rows, mx.array([0, LAST]), k, v)
    mx.eval(k, v)
    yield Large(k, v)
    del k, v
    mx.clear_cache()


def test_rows_are_stored_at_the_end(large: Large) -> None:
    expected = rows(2, 5, mx.float16)
    for pool, (first, last) in zip(large, expected, strict=True):
        assert np.array_equal(bits(pool[0]), bits(first))
        assert np.array_equal(bits(pool[LAST]), bits(last))
        assert not bits(pool[WRAPPED]).any() and not bits(pool[1]).any()


def small_pools() -> tuple[Any, Any]:
    return mx.zeros((8, 1, 64), mx.float16), mx.zeros((8, 1, 64), mx.float16)


def test_tokens_and_indices_that_are_far_apart(large: Large) -> None:
    """The two tokens, their slots and their positions, are the first and the last row."""
    x = large.k[::LAST]
    index = large.v.view(mx.int64)[::LAST, 0, 0]
    near = mx.array(rows(2, 5, mx.float16)[0])
    expected = rope_pool_fused(
        near, near, near, mx.array([2, 5]), mx.array([2, 5]), *small_pools(), base=1e4
    )
    found = rope_pool_fused(x, x, x, index, index, *small_pools(), base=1e4)
    for got, want in zip(found, expected, strict=True):
        assert np.array_equal(bits(got), bits(want))
    stored = store_pool(x, x, index, *small_pools())
    for pool in stored:
        assert np.array_equal(bits(pool)[[2, 5]], bits(near))


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_rows_of_a_table(large: Large, factor: float) -> None:
    """A model-dtype table whose last row is read."""
    table = large.k.reshape(SLOTS, 64)
    x = mx.arange(64).reshape(1, 1, 64).astype(mx.float16) / 16
    found = rope_pool_fused(
        *(x, x, x, mx.array([LAST]), mx.array([1]), *small_pools()), cos_sin=table, factor=factor
    )
    row = factor * bits(rows(2, 5, mx.float16)[0])[1, 0].astype(np.float64)
    cosine, sine = row[:32], row[32:]
    a, b = bits(x)[0, 0, :32].astype(np.float64), bits(x)[0, 0, 32:].astype(np.float64)
    exact = np.concatenate([a * cosine - b * sine, b * cosine + a * sine])[None, None]
    close(found[0], exact, 30 * x)
    assert np.array_equal(bits(found[2])[1], bits(found[1])[0])
