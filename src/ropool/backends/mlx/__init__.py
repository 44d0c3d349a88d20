"""The `mlx` backend: MLX's own operations, which run wherever MLX does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ropool.dispatch.key import Key
    from ropool.dispatch.spec import Device


def available() -> str | None:
    """`None` when MLX can be imported, otherwise why not."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        return f"mlx cannot be imported ({error}): pip install 'ropool[mlx]'"
    return None


def supports(key: Key, device: Device) -> str | None:
    """`None`: MLX's operations serve every call that the MLX models make."""
    return None
