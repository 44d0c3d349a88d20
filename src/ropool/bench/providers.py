"""Who can be measured. Ours and the plain-torch path are registered here, and so is every peer of
`ropool.bench.peers`, which is used when its package is installed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

import ropool
from ropool import dispatch
from ropool.bench import torch_path
from ropool.bench.inputs import NORM_EPS, Inputs
from ropool.bench.peers import PEERS
from ropool.bench.provider import Call, Provider
from ropool.bench.workload import Workload
from ropool.errors import RopoolError
from ropool.ops._device import device_of

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
    pairs, norm, fp8, out = (
        workload.interleaved,
        workload.norm,
        workload.fp8,
        bool(workload.q_dtype),
    )

    def rope(x: Inputs) -> None:
        ropool.rope_(x.q, x.k, x.table, x.positions, interleaved=pairs, backend=backend)

    def rope_store_kv(x: Inputs) -> None:
        scale = x.scale if fp8 else None
        ropool.rope_store_kv_(
            x.q, x.k, x.v, x.k_pool, x.v_pool, x.table, x.positions, x.slots,
            interleaved=pairs, k_scale=scale, v_scale=scale, backend=backend,
            q_norm_weight=x.q_norm if norm else None, k_norm_weight=x.k_norm if norm else None,
            norm_eps=NORM_EPS, q_out=x.q_out if out else None, q_scale=x.scale if out else None,
        )  # fmt: skip

    def store_kv(x: Inputs) -> None:
        scale = x.scale if fp8 else None
        ropool.store_kv_(
            x.k, x.v, x.k_pool, x.v_pool, x.slots,
            k_scale=scale, v_scale=scale, backend=backend,
        )  # fmt: skip

    def store_mla(x: Inputs) -> None:
        scale = x.scale if fp8 else None
        ropool.store_mla_(x.v, x.k, x.k_pool, x.slots, scale=scale, backend=backend)

    def rope_store_mla(x: Inputs) -> None:
        ropool.rope_store_mla_(
            x.q, x.v, x.k, x.k_pool, x.table, x.positions, x.slots,
            interleaved=pairs, scale=x.scale if fp8 else None, backend=backend,
            q_out=x.q_out if out else None, q_scale=x.scale if out else None,
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
for _peer in PEERS:
    register(_peer)
