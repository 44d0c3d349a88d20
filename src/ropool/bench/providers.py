"""Who can be measured. A provider says where it can be used, which workloads it covers, and builds
a callable for one. Ours and the plain-torch path are registered here; a package that can do the
same work joins by one more `register`, and is used when it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import ropool
from ropool import dispatch
from ropool.bench import torch_path
from ropool.bench.inputs import Inputs
from ropool.bench.workload import Workload
from ropool.errors import RopoolError
from ropool.ops._device import device_of

Call = Callable[[Inputs], Tensor | None]
"""One timed call. Returns the rotated query, as `[T, Hq, D]` or `[1, Hq, T, D]`, when it is not
written into `inputs.q`."""


def covers_all(workload: Workload) -> None:
    """`why_not` of a provider that covers every workload."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to do the work of the ops.

    `unavailable(device)` says why it cannot be used on this machine and device, `why_not(workload)`
    why it does not cover a workload; both give `None` when it can. `build(workload)` prepares
    whatever a call needs, outside of the timed region.
    """

    name: str
    version: Callable[[], str]
    unavailable: Callable[[torch.device], str | None]
    build: Callable[[Workload], Call]
    why_not: Callable[[Workload], str | None] = covers_all
    splits_pairs: bool = False
    """Leaves interleaved pairs as two halves, `x0, x2, ..., x1, x3, ...`, as `transformers` does.
    """


_providers: dict[str, Provider] = {}


def register(provider: Provider) -> None:
    """Make a provider known. A second one of the same name raises `ValueError`."""
    if provider.name in _providers:
        raise ValueError(f"ropool.bench: provider {provider.name!r} is registered already")
    _providers[provider.name] = provider


def providers() -> dict[str, Provider]:
    """Every provider by name: `ropool.<backend>` for each backend, then the registered ones."""
    ours = [ropool_provider(spec.name) for spec in dispatch.backends()]
    return {provider.name: provider for provider in ours} | _providers


def choose(names: Sequence[str]) -> list[Provider]:
    """The providers called `names`. Raises `RopoolError` for one that does not exist."""
    known = providers()
    for name in names:
        if name not in known:
            raise RopoolError(f"bench: provider {name!r} is unknown; known: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def ropool_provider(backend: str) -> Provider:
    """One of our backends, called as a user calls it."""

    def unavailable(device: torch.device) -> str | None:
        kind = device_of(device).kind
        kinds = {
            kind
            for op in dispatch.OPS
            for kernel in dispatch.kernels(op)
            if kernel.backend == backend
            for kind in kernel.devices
        }
        if kind not in kinds:
            return f"runs on {', '.join(sorted(kinds))}, not on {kind}"
        return dispatch.unavailable(backend)

    return Provider(
        name=f"ropool.{backend}",
        version=lambda: ropool.__version__,
        unavailable=unavailable,
        build=partial(ropool_call, backend),
    )


def ropool_call(backend: str, workload: Workload) -> Call:
    """The op itself on `backend`, which runs or raises."""
    pairs = workload.interleaved

    def rope(x: Inputs) -> None:
        ropool.rope_(x.q, x.k, x.table, x.positions, interleaved=pairs, backend=backend)

    def rope_store_kv(x: Inputs) -> None:
        ropool.rope_store_kv_(
            x.q, x.k, x.v, x.k_pool, x.v_pool, x.table, x.positions, x.slots,
            interleaved=pairs, k_scale=x.scale, v_scale=x.scale, backend=backend,
        )  # fmt: skip

    def store_kv(x: Inputs) -> None:
        ropool.store_kv_(
            x.k, x.v, x.k_pool, x.v_pool, x.slots,
            k_scale=x.scale, v_scale=x.scale, backend=backend,
        )  # fmt: skip

    def store_mla(x: Inputs) -> None:
        ropool.store_mla_(x.v, x.k, x.k_pool, x.slots, scale=x.scale, backend=backend)

    def rope_store_mla(x: Inputs) -> None:
        ropool.rope_store_mla_(
            x.q, x.v, x.k, x.k_pool, x.table, x.positions, x.slots,
            interleaved=pairs, scale=x.scale, backend=backend,
        )  # fmt: skip

    calls: dict[str, Call] = {
        "rope_": rope,
        "rope_store_kv_": rope_store_kv,
        "store_kv_": store_kv,
        "store_mla_": store_mla,
        "rope_store_mla_": rope_store_mla,
    }
    return calls[workload.op]


for _name, _build in (("torch.eager", torch_path.eager), ("torch.compiled", torch_path.compiled)):
    register(
        Provider(
            name=_name,
            version=torch_path.version,
            unavailable=torch_path.unavailable,
            build=_build,
            splits_pairs=True,
        )
    )
