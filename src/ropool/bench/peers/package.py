"""What the peers share: is a package there, without importing it, since some take long and some
cannot be imported; and how its providers and calls are put together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from ropool.bench.inputs import Inputs
from ropool.bench.provider import Call, Provider
from ropool.bench.workload import Workload

Unavailable = Callable[[torch.device], str | None]


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution with kernels for CUDA devices, and the modules without which they cannot be
    called."""

    distribution: str
    modules: tuple[str, ...]

    def version(self) -> str:
        try:
            return f"{self.distribution} {metadata.version(self.distribution)}"
        except metadata.PackageNotFoundError:
            return self.distribution

    def provider(self, name: str, build: Callable[[Workload], Call], **others: Any) -> Provider:
        """One way to do the work of the ops with it; `others` are further fields of `Provider`."""
        unavailable = needs(*self.modules)
        return Provider(
            name=name, version=self.version, unavailable=unavailable, build=build, **others
        )


def needs(*modules: str) -> Unavailable:
    """`unavailable` of a provider that runs on CUDA devices and calls `modules`."""

    def unavailable(device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.cuda is None:
            return "runs on NVIDIA GPUs only"
        for module in modules:
            try:
                found = importlib.util.find_spec(module)
            except (ImportError, ValueError):
                found = None
            if found is None:
                return f"{module} is not installed"
        return None

    return unavailable


def same_dtype_pool(w: Workload) -> bool:
    """The pool holds the model's dtype, and the query stays where it is."""
    return w.kv_dtype in ("", w.dtype) and not w.q_dtype


def in_turn(first: Call, second: Call) -> Call:
    """Both kernels, one after the other; none of them returns a query."""

    def call(x: Inputs) -> None:
        first(x)
        second(x)

    return call
