"""The public functions: in an eager call compiled code finds the kernel's launch and starts it, and
the Python definition of the op serves every call that is not as simple as that."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, ParamSpec

import torch

from ropool.ops import _launches

_P = ParamSpec("_P")

MODES: tuple[Callable[[], object], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._autograd._profiler_enabled,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
)
"""While one of these says anything but no, PyTorch has to see a call."""

_COMPILING = "_is_compiling_flag"
"""What `torch.compiler.is_compiling` tells, in its module."""


def eager(definition: Callable[_P, None]) -> Callable[_P, None]:
    """The public function of the op that `definition` defines, a compiled object that looks like
    it; without the compiled part the definition itself. `connect` makes it fast."""
    if _launches.reader() is None or not hasattr(torch.compiler, _COMPILING):
        return definition
    public = functools.update_wrapper(_launches.native.Function(definition), definition)
    # `torch.compile` and `torch.jit.script` take it for what `torch.jit.script_if_tracing` makes,
    # and see the definition.
    vars(public)["__script_if_tracing_wrapper"] = True
    vars(public)["__original_fn"] = definition
    return public


def connect(
    public: Callable[..., None], launches: _launches.Launches, values: tuple[str, ...]
) -> Any:
    """Let the public function of an op look calls up in `launches`; `values` names tensors,
    options and backend in their order there. The compiled entry, `None` without one."""
    if type(public) is FunctionType:
        return None
    parameters = inspect.signature(public).parameters
    entry = _launches.native.Entry(
        launches,
        [(name, values.index(name)) for name in parameters],
        sum(parameter.kind is not parameter.KEYWORD_ONLY for parameter in parameters.values()),
        tuple(parameters[name].default for name in values),
        inspect.Parameter.empty,
        vars(torch.compiler),
        _COMPILING,
        MODES,
    )
    public.connect(entry)  # type: ignore[attr-defined]
    return entry
