"""The `metal` backend: kernels for MLX in the distribution `ropool-metal`, which runs them on Apple
GPUs and, in C++, on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ropool.dispatch.key import Key
    from ropool.dispatch.spec import Device
    from ropool.dispatch.tuning import Table

DTYPES = ("float16", "bfloat16", "float32")


def available() -> str | None:
    """`None` when the kernels can run here, otherwise why not."""
    try:
        import ropool_metal  # noqa: F401
    except ImportError as error:
        return f"ropool-metal cannot be used ({error}); in a clone: pip install ./metal"
    return None


def check_tuning(table: Table) -> None:
    """Raise `ValueError` for a choice or a rule that `ropool.mlx.policy` does not know."""
    for choices in table.entries.values():
        for choice in choices.values():
            if type(choice.get("fused")) is not bool:
                raise ValueError(f"fused is {choice.get('fused')!r}; allowed: true, false")
    for rule in table.rules.get("built_in", []):
        for name in ("most_heads_kv", "least_tokens"):
            if type(rule.get(name)) is not int:
                raise ValueError(f"{name} is {rule.get(name)!r}; allowed: whole numbers")


def supports(key: Key, device: Device) -> str | None:
    """`None` when the kernels serve `key`, otherwise why not."""
    if key.dtype not in DTYPES:
        return f"dtype {key.dtype}: only {', '.join(DTYPES)}"
    if key.pool_dtype != key.dtype:
        return f"pool_dtype {key.pool_dtype}: only the dtype of the model"
    if key.layout not in ("NHD", "slots"):
        return f"layout {key.layout}: only NHD, slots"
    if key.v_head_dim != key.head_dim:
        return f"v_head_dim {key.v_head_dim}: only head_dim ({key.head_dim})"
    for name in ("q_norm_dtype", "mrope_section", "window_map_dtype", "k_scale", "q_out_dtype"):
        if getattr(key, name) is not None:
            return f"{name} {getattr(key, name)}: not covered"
    return None
