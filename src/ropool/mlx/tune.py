"""Times the kernels beside MLX's own operations, and says which to use at each shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ropool import dispatch
from ropool.dispatch import Options, tuning
from ropool.dispatch.spec import load
from ropool.engine.cache import PAGE_SIZE
from ropool.mlx.aot import MlxAOTKernelBuildInputs
from ropool.mlx.policy import current_device
from ropool.mlx.rotation import read_rotation

CONTEXT = 8192
ROUNDS = 7
SECONDS = 0.05
"""Time that one round of one path takes, at least."""

OP = "rope_store_kv_"


class Found(NamedTuple):
    """Microseconds of both paths at one shape."""

    heads: tuple[int, int, int]
    dtype: str
    tokens: int
    fused_us: float
    built_in_us: float


def tune(
    heads: Sequence[tuple[int, int, int]], dtypes: Sequence[str], tokens: Sequence[int]
) -> Iterator[tuple[Found, tuning.Table]]:
    """Measure every `(Hq, Hk, D)`, dtype and number of tokens; yield each result with the table of
    its choice. Raises `RopoolError` or `NoKernelError` where the kernels cannot run."""
    device = current_device()
    for form in heads:
        for dtype in dtypes:
            inputs = _inputs(form, dtype, device)
            for count in tokens:
                fused, built_in = _measure(inputs, count)
                found = Found(form, dtype, count, fused, built_in)
                table = tuning.Table("metal", device.name)
                table.measured_with["mlx"] = metadata.version("mlx")
                choice = {"fused": fused <= built_in, "speedup": round(built_in / fused, 3)}
                table.entries[tuning.subject(inputs.key(OP))] = {count: choice}
                yield found, table


def _inputs(
    form: tuple[int, int, int], dtype: str, device: dispatch.Device
) -> MlxAOTKernelBuildInputs:
    heads_q, heads_kv, head_dim = form
    rotation = read_rotation(nn.RoPE(head_dim, base=10000.0), CONTEXT, table=device.name == "cpu")
    facts = (heads_q, heads_kv, head_dim, dtype, PAGE_SIZE, rotation, device)
    return MlxAOTKernelBuildInputs(None, *facts)


def _measure(inputs: MlxAOTKernelBuildInputs, tokens: int) -> tuple[float, float]:
    """Microseconds of the kernel and of the built-in path, whose rounds alternate."""
    paths = [_path(inputs, tokens, backend) for backend in ("metal", "mlx")]
    calls = [_calls(path) for path in paths]
    rounds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for path, count, times in zip(paths, calls, rounds, strict=True):
            times.append(_time(path, count) / count * 1e6)
    return statistics.median(rounds[0]), statistics.median(rounds[1])


def _path(inputs: MlxAOTKernelBuildInputs, tokens: int, backend: str) -> Callable[[], None]:
    key = inputs.key(OP)
    chosen = dispatch.select(OP, inputs.device, key, backend)
    launch = load(chosen.target)(key, (), Options())
    dtype = getattr(mx, inputs.dtype)
    q = mx.random.normal((tokens, inputs.heads_q, inputs.head_dim)).astype(dtype)
    k = mx.random.normal((tokens, inputs.heads_kv, inputs.head_dim)).astype(dtype)
    pages = max(2 * tokens // PAGE_SIZE, 1) + 1
    shape = (pages, PAGE_SIZE, inputs.heads_kv, inputs.head_dim)
    pools = [mx.zeros(shape, dtype), mx.zeros(shape, dtype)]
    positions = mx.arange(tokens) % CONTEXT
    slots = mx.random.permutation(pages * PAGE_SIZE)[:tokens].astype(mx.int32)
    mx.eval(q, k, pools, positions, slots)

    def run() -> None:
        rotated = launch((q, k, k, *pools, inputs.rotation, positions, slots))
        pools[:] = rotated[2:]
        mx.eval(rotated)

    return run


def _time(path: Callable[[], None], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        path()
    return time.perf_counter() - started


def _calls(path: Callable[[], None]) -> int:
    """Calls that take about `SECONDS`, after a warm-up."""
    _time(path, 3)
    return max(3, int(SECONDS / max(_time(path, 3) / 3, 1e-7)))
