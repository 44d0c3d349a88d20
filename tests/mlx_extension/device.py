"""Where the MLX tests run: `ROPOOL_MLX_DEVICE`, `cpu` (the default) or `gpu`."""

from __future__ import annotations

import os

import mlx.core as mx


def use_device() -> str:
    """Make the chosen device MLX's default and return its name."""
    name = os.environ.get("ROPOOL_MLX_DEVICE") or "cpu"
    if name not in ("cpu", "gpu"):
        raise ValueError(f"ROPOOL_MLX_DEVICE is {name!r}; allowed: cpu, gpu")
    mx.set_default_device(getattr(mx, name))
    return name
