"""Runs every form of the primitives against float64 on this machine and prints a table.

    python -m mlx_extension.verify [cpu|gpu]

For a Mac: `make verify-mac`. The exit code is 1 when a row is wrong.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from ropool_metal import has_gpu_kernels, rope_pool_fused, store_pool

from mlx_extension.device import use_device
from mlx_extension.oracle import bits, close, rotated

FORMS = ("one dispatch", "three dispatches", "store")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# heads of Q and K, D, R: partial rotations, and dims that take narrower loads.
SHAPES = ((9, 3, 64, 64), (32, 8, 128, 128), (14, 2, 80, 32), (5, 1, 60, 36), (4, 2, 7, 2))
SOURCES = ("base", "frequencies", "table")
TOKENS = (1, 33)
SLOTS = 128
POSITIONS = (0, 1, 17, 4095, 8191, 131071)
ROWS = 8192
"""Positions that the tables hold."""


class Row(NamedTuple):
    """One line of the table."""

    form: str
    dtype: Any
    shape: tuple[int, int, int, int]
    interleaved: bool
    source: str
    tokens: int


def rows() -> list[Row]:
    """The matrix; `store` has no rotation to vary."""
    found = []
    for form, dtype, shape, tokens in itertools.product(FORMS, DTYPES, SHAPES, TOKENS):
        styles = itertools.product((False, True), SOURCES)
        for interleaved, source in [(False, "-")] if form == "store" else styles:
            found.append(Row(form, dtype, shape, interleaved, source, tokens))
    return found


def verify(row: Row) -> float:
    """Microseconds of one call. Raises `AssertionError` when a value is wrong."""
    heads_q, heads_kv, dim, rotary = row.shape
    rng = np.random.default_rng(1)

    def normal(heads: int) -> Any:
        values = rng.standard_normal((row.tokens, heads + 1, dim)).astype(np.float32)
        return mx.array(values).astype(row.dtype)[:, 1:]

    q, k, v = normal(heads_q), normal(heads_kv), normal(heads_kv)
    slots = rng.permutation(SLOTS)[: row.tokens].astype(np.int64)
    slots[1::5] = -1
    slots[2::7] = SLOTS
    positions = rng.choice(POSITIONS, row.tokens)
    k_pool = mx.zeros((SLOTS, heads_kv, dim), row.dtype)
    v_pool = mx.zeros((SLOTS, heads_kv, dim), row.dtype)
    frequencies = 10000.0 ** (-np.arange(0, rotary, 2) / rotary)
    known = [True] * row.tokens
    options: dict[str, Any] = {"interleaved": row.interleaved}
    if row.source == "base":
        options |= {"base": 10000.0, "rotary_dim": rotary}
    elif row.source == "frequencies":
        frequencies = frequencies.astype(np.float32)
        options["inv_freq"] = mx.array(frequencies)
    elif row.source == "table":
        angles = np.outer(np.arange(ROWS), frequencies)
        options["cos_sin"] = mx.array(np.concatenate([np.cos(angles), np.sin(angles)], 1))
        options["cos_sin"] = options["cos_sin"].astype(mx.float32)
        known = [position < ROWS for position in positions]

    def call() -> tuple[Any, ...]:
        if row.form == "store":
            return (None, None, *store_pool(k, v, mx.array(slots), k_pool, v_pool))
        single = row.form == "one dispatch"
        arrays = (q, k, v, mx.array(positions), mx.array(slots), k_pool, v_pool)
        return rope_pool_fused(*arrays, single_dispatch=single, **options)

    q_out, k_out, k_new, v_new = call()
    stored = k
    if row.form != "store":
        style = {"interleaved": row.interleaved, "known": known}
        close(q_out, rotated(q, positions, frequencies, **style), q)
        close(k_out, rotated(k, positions, frequencies, **style), k)
        stored = k_out
    for got, source in ((k_new, stored), (v_new, v)):
        expected = np.zeros((SLOTS, heads_kv, dim), np.float32)
        for at, slot in enumerate(slots):
            if 0 <= slot < SLOTS and known[at]:
                expected[slot] = bits(source)[at]
        assert np.array_equal(bits(got), expected), "a pool row is wrong"
    return _microseconds(lambda: mx.eval([x for x in call() if x is not None]))


def _microseconds(run: Callable[[], None]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times) * 1e6


def main() -> int:
    if len(sys.argv) > 1:
        os.environ["ROPOOL_MLX_DEVICE"] = sys.argv[1]
    device = use_device()
    info = mx.device_info() if device == "gpu" else {}
    print(f"mlx {mx.__version__}, {device} {info.get('device_name', '')}".rstrip())
    if device == "gpu" and not has_gpu_kernels:
        print("this build of ropool-metal has no GPU kernels", file=sys.stderr)
        return 1
    wrong = 0
    line = "{:<17} {:<9} {:<13} {:<12} {:<12} {:>6}  {:>8}  {}"
    print(line.format("form", "dtype", "Hq Hk D R", "pairs", "angles", "tokens", "us", "result"))
    for row in rows():
        try:
            taken, result = f"{verify(row):.0f}", "ok"
        except Exception as error:
            wrong += 1
            taken, result = "-", f"WRONG: {type(error).__name__}: {error}"
        name = str(row.dtype).rpartition(".")[2]
        pairs = "interleaved" if row.interleaved else "neox"
        shape = " ".join(map(str, row.shape))
        print(line.format(row.form, name, shape, pairs, row.source, row.tokens, taken, result))
    print(f"{len(rows()) - wrong} of {len(rows())} right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
