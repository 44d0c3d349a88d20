"""`explain`: which kernel would serve a call, and why the others would not."""

from __future__ import annotations

import inspect
from typing import Any

from ropool.dispatch import OPS, KernelReport
from ropool.ops import rope, rope_store_kv, rope_store_mla, store_kv, store_mla
from ropool.ops._op import hashable

_MODULES = {
    module.OP.name: module for module in (rope, rope_store_kv, store_kv, store_mla, rope_store_mla)
}


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
    if op not in _MODULES:
        raise ValueError(f"ropool.explain: op is {op!r}; known: {', '.join(OPS)}")
    module = _MODULES[op]
    call = inspect.signature(getattr(module, op)).bind(*args, **kwargs)
    call.apply_defaults()
    tensors = tuple(call.arguments[name] for name in module.OP.tensors)
    options = tuple(hashable(call.arguments[name]) for name in module.OP.option_names)
    return Explanation(module.OP.explain(tensors, options, call.arguments["backend"]))
