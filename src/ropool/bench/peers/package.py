"""Is a package there, without importing it: some take long, some cannot be imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata

import torch

from ropool.bench.workload import Workload

Unavailable = Callable[[torch.device], str | None]


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


def version(package: str) -> Callable[[], str]:
    """`version` of a provider."""

    def found() -> str:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            return package

    return found


def same_dtype_pool(w: Workload) -> bool:
    """The pool holds the model's dtype, and the query stays where it is."""
    return w.kv_dtype in ("", w.dtype) and not w.q_dtype
