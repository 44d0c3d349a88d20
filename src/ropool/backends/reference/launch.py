"""Bind the definitions to calls: the tensors of a launch are passed on by name, the options are
fixed."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from ropool.backends.reference import ops
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args, Launch

Bind = Callable[[Key, Args, Options], Launch]


def _binder(function: Callable[..., None]) -> Bind:
    parameters = inspect.signature(function).parameters

    def bind(key: Key, args: Args, options: Options) -> Launch:
        fixed = {name: value for name, value in options._asdict().items() if name in parameters}

        def launch(args: Args) -> None:
            function(**dict(zip(names, args, strict=True)), **fixed)

        return launch

    names = [name for name in parameters if name not in (*Options._fields, "backend")]
    return bind


rope_ = _binder(ops.rope_)
rope_store_kv_ = _binder(ops.rope_store_kv_)
store_kv_ = _binder(ops.store_kv_)
store_mla_ = _binder(ops.store_mla_)
rope_store_mla_ = _binder(ops.rope_store_mla_)
