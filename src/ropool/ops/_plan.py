"""`plan`: a call that is validated, keyed and bound once, and then made again and again."""

from __future__ import annotations

from typing import Any

import torch

from ropool.ops._call import Call, described

_is_compiling = torch.compiler.is_compiling


class Plan:
    """A call that is ready to be made: `plan()` makes it. See `ropool.plan`."""

    __slots__ = ("_call", "_run", "kernel")

    def __init__(self, call: Call) -> None:
        self._call = call
        self.kernel, launch = call.op.bind(call.tensors, call.options, call.backend)
        """`backend/name` of the kernel that runs, empty for a call without tokens."""
        freeze = getattr(launch, "freeze", None)
        tensors = call.tensors
        self._run = (lambda: launch(tensors)) if freeze is None else freeze(tensors)

    def __call__(self) -> None:
        """Make the call, on the current stream."""
        if _is_compiling():
            call = self._call
            call.op(call.tensors, call.options, call.backend, call.overload)
            return
        self._run()

    def __repr__(self) -> str:
        return f"<ropool.Plan {self._call.op.name} on {self.kernel or 'nothing'}>"


def plan(op: str, *args: Any, **kwargs: Any) -> Plan:
    """Binds a call of `op` to its kernel and returns it; nothing is run or written yet.

    Each `plan()` then makes the call on these very tensors, whatever stands in them by then, for
    less host time than the op itself needs: arguments are not looked at again. It suits a layer
    whose inputs, pool and indices stay where they are, as they do for CUDA graphs. The kernel is
    compiled here, so that a plan can be captured without a warm-up.

    What is decided here stays: kernel, options, shapes, strides, addresses and the settings
    (`ROPOOL_CHECK`, `ROPOOL_BACKEND`). The plan keeps the tensors alive; they must not be given
    other memory (`set_`, `resize_`). Within `torch.compile` a plan is the op that it was made from;
    PyTorch's other modes (tracing, profiling) do not see it.

    The arguments are those of the op: `ropool.plan("rope_", q, k, cos_sin_cache, positions)`.

    Raises:
        ValueError, TypeError: no such op, or the arguments do not fit it.
        RuntimeError: no kernel can serve the call, or a tensor requires grad.
    """
    return Plan(described("plan", op, args, kwargs))
