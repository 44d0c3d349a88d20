"""`explain`: which kernel would serve a call, and why the others would not."""

from __future__ import annotations

from typing import Any

from ropool.dispatch import KernelReport
from ropool.ops._call import described


class Explanation(list[KernelReport]):
    """The reports of an op's kernels, the most preferred first; prints as a table."""

    def __str__(self) -> str:
        width = max((len(report.kernel.label) for report in self), default=0)
        return "\n".join(
            f"{report.kernel.label:<{width}}  {'chosen' if report.chosen else report.reason}"
            for report in self
        )


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Every kernel of `op` with chosen or why not, for a call with these arguments; nothing is run
    or written.

    The arguments are those of the op: `ropool.explain("rope_", q, k, cos_sin_cache, positions)`.

    Raises:
        ValueError, TypeError: no such op, or the arguments do not fit it.
    """
    call = described("explain", op, args, kwargs)
    return Explanation(call.op.explain(call.tensors, call.options, call.backend))
