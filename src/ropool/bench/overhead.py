"""What a call costs that has nothing to do: from the public function to the kernel and back, and
where the time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import ropool
from ropool.dispatch import cache, settings
from ropool.errors import RopoolError
from ropool.ops import rope_store_kv

HEADS = (1, 1, 8)
CALLS = 2000
SAMPLES = 31


@dataclass(frozen=True, slots=True)
class Overhead:
    """Median microseconds of a `rope_store_kv_` call with one token and one head of 8."""

    kernel: str
    total_us: float
    """The public function."""
    arguments_us: float
    """Packing the arguments, and asking whether PyTorch has to see the call."""
    signature_us: float
    """Reading shapes, strides and dtypes into the signature of the call."""
    look_up_us: float
    """Hashing the signature and finding its launch."""
    launch_us: float
    """The launch: from dispatch to the kernel and back, the kernel's work included."""
    launch_is: str
    """`native` when dispatch calls compiled code directly, else `Python`."""
    plan_us: float
    """The same call as a plan, see `ropool.plan`."""
    add_us: float
    """For comparison: `torch.add(a, b, out=c)` with one element."""

    def lines(self) -> list[str]:
        """For a terminal."""
        found = asdict(self)
        parts = {
            "arguments, torch's modes": "arguments_us",
            "signature": "signature_us",
            "look-up": "look_up_us",
            f"launch and kernel ({self.launch_is})": "launch_us",
        }
        width = max(map(len, parts)) + 2
        return [
            f"rope_store_kv_ with T = 1 and heads {'x'.join(map(str, HEADS))} on {self.kernel}:"
            f" {self.total_us:.2f} us a call (median)",
            *(f"  {title:<{width}}{found[name]:>7.2f} us" for title, name in parts.items()),
            f"  {'the same call as a plan':<{width}}{self.plan_us:>7.2f} us",
            f"  {'to compare: torch.add, out=':<{width}}{self.add_us:>7.2f} us",
        ]


def overhead(device: torch.device) -> Overhead:
    """Measure on `device`, with the kernel that dispatch chooses. On a GPU the host's time counts:
    its kernels are over before the next call.

    Each stage is timed on its own, from the inside out, and what a stage adds is the difference to
    the one inside it. Raises `RopoolError` for settings under which a call does other things.
    """
    if settings.current().check:
        raise RopoolError("bench: --overhead measures calls without checks; unset ROPOOL_CHECK")
    heads_q, heads_kv, dim = HEADS
    q = torch.randn(1, heads_q, dim, device=device)
    k, v = torch.randn(2, 1, heads_kv, dim, device=device).unbind()
    k_pool, v_pool = torch.zeros(2, 4, 16, heads_kv, dim, device=device).unbind()
    table = torch.randn(32, dim, device=device)
    index = torch.tensor([3], device=device)
    args = (q, k, v, k_pool, v_pool, table, index, index)

    def public() -> None:
        ropool.rope_store_kv_(*args)

    with torch.no_grad():
        cache.clear()
        public()
        [(signature, launch)] = cache.launches.items()
        tensors = (*args, *[None] * (len(rope_store_kv.OP.tensors) - len(args)))
        options: tuple[object, ...] = signature[2]  # type: ignore[index]
        run, launches = rope_store_kv.OP._run, cache.launches
        a, b, c = torch.randn(3, 1, device=device).unbind()
        total, inside, found, launched, planned, add = medians(
            public,
            lambda: run(tensors, options, None),
            lambda: launches.get(signature),
            lambda: launch(tensors),
            ropool.plan("rope_store_kv_", *args),
            lambda: torch.add(a, b, out=c),
        )
    return Overhead(
        kernel=cache.chosen["rope_store_kv_"],
        total_us=total,
        arguments_us=total - inside,
        signature_us=inside - found - launched,
        look_up_us=found,
        launch_us=launched,
        launch_is="Python" if hasattr(launch, "__code__") else "native",
        plan_us=planned,
        add_us=add,
    )


def medians(*stages: Callable[[], object]) -> list[float]:
    """Microseconds a call, samples of the stages interleaved, less an empty function's."""
    timed = (lambda: None, *stages)
    samples: list[list[float]] = [[] for _ in timed]
    for _ in range(SAMPLES):
        for stage, mine in zip(timed, samples, strict=True):
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                stage()
            mine.append((time.perf_counter_ns() - start) / 1e3 / CALLS)
    empty, *found = (statistics.median(mine) for mine in samples)
    return [value - empty for value in found]
