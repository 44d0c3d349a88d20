"""When the kernels are used: the setting, and a table of the shapes at which they lose."""

from __future__ import annotations

import os

import mlx.core as mx

from ropool.dispatch import Device, Key, tuning
from ropool.errors import RopoolError

VARIABLE = "ROPOOL_MLX_CUSTOM_ROPE"
ALLOWED = ("auto", "1", "0")
APPLE = "Apple GPU"
"""The table whose rules hold for every Apple GPU."""


def custom_rope() -> str:
    """`ROPOOL_MLX_CUSTOM_ROPE`: `auto` (by the table), `1` (always, or an error) or `0` (never)."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in ALLOWED:
        raise RopoolError(f"{VARIABLE} is {value!r}; allowed: {', '.join(ALLOWED)}")
    return value


def current_device() -> Device:
    """Where MLX runs in this process."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        return Device("mlx", str(info.get("device_name", APPLE)), str(info.get("architecture", "")))
    return Device("mlx", "cpu")


def keeps_built_in(device: str, key: Key, tokens: int) -> bool:
    """Whether MLX's own operations are kept for a call with so many tokens: where they were
    measured to be faster on this device, or are known to be on Apple GPUs."""
    choice = tuning.choice_of("metal", device, key, tokens)
    if choice is not None:
        return not choice["fused"]
    if device == "cpu":
        return False
    rules = tuning.table_of("metal", APPLE).rules.get("built_in", [])
    return any(
        key.heads_kv <= rule["most_heads_kv"] and tokens >= rule["least_tokens"] for rule in rules
    )
