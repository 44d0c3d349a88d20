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
from ropool.ops._call import described

HEADS = (1, 1, 8)
CALLS = 2000
SAMPLES = 31


@dataclass(frozen=True, slots=True)
class Overhead:
    """Median microseconds of a `rope_store_kv_` call with one token and one head of 8."""

    kernel: str
    total_us: float
    """The public function."""
    python_us: float
    """From Python to the public function and back. Without compiled code the definition of the op
    runs: then all of the stages but the last stand here, and are 0 below."""
    arguments_us: float
    """Sorting the arguments."""
    modes_us: float
    """Asking whether PyTorch has to see the call."""
    signature_us: float
    """Reading options, shapes, strides, dtypes and addresses."""
    look_up_us: float
    """Finding the launch."""
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
            "from Python and back": "python_us",
            "arguments": "arguments_us",
            "PyTorch's modes": "modes_us",
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

    Compiled code times each stage on its own; what they do not account for is Python's. Raises
    `RopoolError` for settings under which a call does other things.
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

    op = rope_store_kv.OP
    tensors = (*args, *[None] * (len(op.tensors) - len(args)))
    options = described("bench", op.name, args, {}).options

    def public() -> None:
        ropool.rope_store_kv_(*args)

    with torch.no_grad():
        cache.clear()
        public()
        launch = op.launches.find(tensors, options, None)
        assert launch is not None
        a, b, c = torch.randn(3, 1, device=device).unbind()
        total, launched, planned, add = medians(
            public,
            lambda: launch(tensors),
            ropool.plan("rope_store_kv_", *args),
            lambda: torch.add(a, b, out=c),
        )
        stages = [0.0, 0.0, 0.0, 0.0, launched]
        if op.entry is not None:
            samples = [op.entry.stages(args, {}, CALLS) for _ in range(SAMPLES)]
            stages = [statistics.median(sample) / 1e3 for sample in zip(*samples, strict=True)]
    arguments, modes, signature, look_up, launched = stages
    return Overhead(
        kernel=cache.chosen[op.name],
        total_us=total,
        python_us=total - sum(stages),
        arguments_us=arguments,
        modes_us=modes,
        signature_us=signature,
        look_up_us=look_up,
        launch_us=launched,
        launch_is="native" if hasattr(launch, "native") else "Python",
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
