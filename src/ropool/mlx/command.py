"""What `ropool generate --engine mlx` needs of MLX, in plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from ropool.mlx.engine import MlxEngine
from ropool.mlx.load import load
from ropool.mlx.model import MlxModel

__all__ = ["MlxEngine", "open_model", "use_device"]


class DeviceName(NamedTuple):
    """`gpu` or `cpu`, and the product name of a GPU."""

    kind: str
    name: str


def use_device(asked: str) -> DeviceName:
    """Run on the CPU when `asked` is `cpu`, otherwise on the GPU if there is one."""
    if asked == "cpu" or not mx.is_available(mx.gpu):
        mx.set_default_device(mx.cpu)
        return DeviceName("cpu", "")
    mx.set_default_device(mx.gpu)
    return DeviceName("gpu", str(mx.device_info().get("device_name", "")))


def open_model(name: str, dtype: str, report: Callable[[str], None]) -> tuple[MlxModel, Any]:
    """The model and its tokenizer; see `ropool.mlx.load.load`."""
    return load(name, dtype=getattr(mx, dtype), report=report)
