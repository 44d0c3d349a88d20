"""A call that is described instead of made: for those who ask about it, or make it later."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ropool.dispatch import OPS
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.ops import rope, rope_store_kv, rope_store_mla, store_kv, store_mla
from ropool.ops._op import Op, hashable, overload_of

_MODULES = {
    module.OP.name: module for module in (rope, rope_store_kv, store_kv, store_mla, rope_store_mla)
}


@dataclass(frozen=True, slots=True)
class Call:
    """An op, its tensors in the order in which kernels get them, and its options."""

    op: Op
    tensors: Args
    options: tuple[Any, ...]
    backend: str | None
    overload: str

    def key(self) -> tuple[Key, Options]:
        """Validate the call; its key and its options by name."""
        return self.op.key(self.tensors, self.options, self.backend)


def described(who: str, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call of `op` with these arguments, for the public function `who`. Raises `ValueError`
    for an op that does not exist and `TypeError` for arguments that it does not have."""
    if op not in _MODULES:
        raise ValueError(f"ropool.{who}: op is {op!r}; known: {', '.join(OPS)}")
    module = _MODULES[op]
    call = inspect.signature(getattr(module, op)).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    return Call(
        op=module.OP,
        tensors=tuple(given[name] for name in module.OP.tensors),
        options=tuple(hashable(given[name]) for name in module.OP.option_names),
        backend=given["backend"],
        overload=overload_of(bool(given.get("write_k")), given.get("q_out")),
    )
