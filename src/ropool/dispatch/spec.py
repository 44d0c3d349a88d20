"""Records of backends and kernels. They are metadata: creating or registering one imports no
backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Args = tuple[Any, ...]
"""An op's tensors in the order that its file names them, `None` where an optional one is absent."""

Launch = Callable[[Args], None]
"""A bound kernel: runs on any tensors with the metadata that it was bound for."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a kernel runs. `kind` is `cpu`, `cuda`, `hip`, `xpu`, `mps` or `mlx`."""

    kind: str
    name: str = ""
    """The product name that tuning tables are indexed by, such as `NVIDIA H200`."""
    arch: str = ""
    """The instruction set that code is generated for, such as `sm_90` or `gfx942`."""


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """How a family of kernels is built. `available` names a `module:function` that takes nothing
    and returns `None`, or in words why the backend cannot be used in this process. `check_tuning`,
    where it has tuning tables, names one that takes a table and raises `ValueError` for choices or
    rules that the backend does not know."""

    name: str
    available: str
    check_tuning: str = ""


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel of one op. `backend` says how it was built, `devices` where it runs.

    `target` names a `module:function` with the signature `bind(key, args, options) -> launch`,
    where `launch(args) -> None` serves every call whose tensors have the same shapes, strides,
    dtypes and device, and whose options are equal. `supports` names a `module:function` with the
    signature `supports(key, device) -> None | str`. Both are imported on first use. Of the kernels
    that can serve a call, the one with the highest `priority` is chosen.
    """

    op: str
    name: str
    backend: str
    target: str
    devices: tuple[str, ...]
    supports: str
    priority: int = 0

    @property
    def label(self) -> str:
        """`backend/name`, the form in reports and in messages."""
        return f"{self.backend}/{self.name}"


def load(target: str) -> Callable[..., Any]:
    """The object that a `module:attribute` target names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
