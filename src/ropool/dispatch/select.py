"""Which kernel serves a call, and why the others do not.

A kernel that does not cover a call is passed over. A backend asked for by name is never passed
over: it runs, or the reason why it cannot is raised.
"""

from __future__ import annotations

from dataclasses import dataclass

from ropool.dispatch import cache, registry
from ropool.dispatch.key import Key
from ropool.dispatch.settings import current
from ropool.dispatch.spec import Device, KernelSpec, load


class NoKernelError(RuntimeError):
    """No kernel can serve a call; the message says why not, kernel by kernel."""


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What `explain` says of one kernel: `reason` is empty when it is chosen."""

    kernel: KernelSpec
    chosen: bool
    reason: str


def why_not(spec: KernelSpec, device: Device, key: Key | None) -> str | None:
    """Why `spec` cannot run on `device` with `key`, or `None`. Without a key only the machine is
    asked about."""
    if device.kind not in spec.devices:
        return f"runs on {', '.join(spec.devices)}, not on {device.kind}"
    reason = registry.unavailable(spec.backend)
    if reason is not None or key is None:
        return reason
    return load(spec.supports)(key, device)


def explain(
    op: str, device: Device, key: Key | None, backend: str | None = None
) -> list[KernelReport]:
    """Every kernel of `op`, the most preferred first, with chosen or why not."""
    wanted = backend or current().backend
    reports: list[KernelReport] = []
    winner: KernelSpec | None = None
    for spec in registry.kernels(op):
        if wanted is not None and spec.backend != wanted:
            reason: str | None = f"backend {wanted} was asked for"
        else:
            reason = why_not(spec, device, key)
        if reason is None and winner is not None:
            reason = f"{winner.label} is preferred"
        elif reason is None:
            winner = spec
        reports.append(KernelReport(spec, reason is None, reason or ""))
    return reports


def select(op: str, device: Device, key: Key, backend: str | None = None) -> KernelSpec:
    """The kernel that serves a call, found once for each `(op, device, key, backend)`.

    Raises `ValueError` for a backend that does not exist and `NoKernelError` when none can serve
    the call.
    """
    question = (op, device, key, backend)
    selections = cache.selections
    found = selections.get(question)
    if found is not None:
        return found
    if backend is not None and backend not in {spec.name for spec in registry.backends()}:
        raise ValueError(
            f"ropool.{op}: backend {backend!r} is unknown; known: {registry.known_backends()}"
        )
    reports = explain(op, device, key, backend)
    for report in reports:
        if report.chosen:
            selections[question] = report.kernel
            return report.kernel
    wanted = backend or current().backend
    relevant = [r for r in reports if wanted is None or r.kernel.backend == wanted]
    reasons = (
        "; ".join(f"{r.kernel.label}: {r.reason}" for r in relevant)
        or f"backend {wanted} has no kernel of it"
    )
    raise NoKernelError(
        f"ropool.{op}: no kernel can serve {key.describe()} on {device.kind}: {reasons}"
    )
