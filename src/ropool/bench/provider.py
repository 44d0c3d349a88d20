"""What a provider is: somebody who can do the work of the ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ropool.bench.inputs import Inputs
from ropool.bench.workload import Workload

Call = Callable[[Inputs], Tensor | None]
"""One timed call. Returns the rotated query, as `[T, Hq, D]` or `[1, Hq, T, D]`, when it is not
written into `inputs.q` or, for an fp8 query, `inputs.q_out`."""


def covers_all(workload: Workload) -> None:
    """`why_not` of a provider that covers every workload."""


def no_bytes(workload: Workload) -> int:
    """`extra_bytes` of a provider that does the work of the op."""
    return 0


def nothing(workload: Workload, inputs: Inputs) -> None:
    """`prepare` of a provider that takes the inputs as they are."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to do the work of the ops.

    `unavailable(device)` says why it cannot be used on this machine and device, `why_not(workload)`
    why it does not cover a workload; both give `None` when it can. `build(workload)` prepares
    whatever a call needs, outside of the timed region; `prepare(workload, inputs)` does the same
    for one set of inputs and keeps it in `inputs.extra[name]`.
    """

    name: str
    version: Callable[[], str]
    unavailable: Callable[[torch.device], str | None]
    build: Callable[[Workload], Call]
    why_not: Callable[[Workload], str | None] = covers_all
    prepare: Callable[[Workload, Inputs], None] = nothing
    splits_pairs: bool = False
    """Leaves interleaved pairs as two halves, `x0, x2, ..., x1, x3, ...`, as `transformers` does.
    """
    writes_k: bool = False
    """May also write the rotated key back into `inputs.k`."""
    clears_pages: bool = False
    """Zeroes rows of the pages that it writes to which hold no token yet."""
    extra_bytes: Callable[[Workload], int] = no_bytes
    """What it moves beyond the op's minimum because it cannot do less."""
    verify: Callable[[Call, Inputs], str | None] | None = None
    """What is wrong with a call that does something else than the op, such as a plain copy."""
