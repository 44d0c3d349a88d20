"""Which backends and kernels exist. The built-in ones stand in `catalog`; others may register
theirs."""

from __future__ import annotations

from ropool.dispatch import cache
from ropool.dispatch.spec import BackendSpec, KernelSpec, load

_backends: dict[str, BackendSpec] = {}
_kernels: dict[tuple[str, str, str], KernelSpec] = {}
_unavailable: dict[str, str | None] = {}

OPS = ("rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_")


def register_backend(spec: BackendSpec) -> None:
    """Make a backend known. Registering an equal record again does nothing; a different one of the
    same name raises `ValueError`."""
    if _backends.setdefault(spec.name, spec) != spec:
        raise ValueError(
            f"ropool: backend {spec.name!r} is registered already, as {_backends[spec.name]}"
        )
    cache.clear()


def register(spec: KernelSpec) -> None:
    """Make a kernel known. Registering an equal record again does nothing; a different one of the
    same op, backend and name raises `ValueError`, as does an unknown op or backend."""
    if spec.op not in OPS:
        raise ValueError(
            f"ropool: kernel {spec.label} is for op {spec.op!r}; known: {', '.join(OPS)}"
        )
    if spec.backend not in _backends:
        raise ValueError(
            f"ropool: kernel {spec.label} names an unknown backend; known: {known_backends()}"
        )
    known = _kernels.setdefault((spec.op, spec.backend, spec.name), spec)
    if known != spec:
        raise ValueError(
            f"ropool: kernel {spec.label} of {spec.op} is registered already, as {known}"
        )
    cache.clear()


def kernels(op: str) -> list[KernelSpec]:
    """The kernels of `op`, the most preferred first."""
    found = [spec for spec in _kernels.values() if spec.op == op]
    return sorted(found, key=lambda spec: -spec.priority)


def backends() -> list[BackendSpec]:
    """The backends, in the order in which they were registered."""
    return list(_backends.values())


def known_backends() -> str:
    """The names of the backends, for messages."""
    return ", ".join(_backends)


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot be used in this process, or `None`. Asked once a process."""
    if backend not in _unavailable:
        _unavailable[backend] = load(_backends[backend].available)()
    return _unavailable[backend]
