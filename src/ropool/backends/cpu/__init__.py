"""The `cpu` backend: vectorised, threaded C++ kernels (the extension module `ropool._cpu`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropool.dispatch.key import Key
    from ropool.dispatch.spec import Device

_DTYPES = ("float16", "bfloat16", "float32")
_FP8 = ("float8_e4m3fn", "float8_e5m2")
_INTEGERS = (None, "int32", "int64")


def available() -> str | None:
    """`None` when the kernels can run here, otherwise why not.

    Raises `ValueError` when `ROPOOL_CPU_ISA` names an instruction set that cannot be used here.
    """
    try:
        from ropool import _cpu
    except ImportError as error:
        return f"the compiled extension ropool._cpu is not there ({error})"
    _cpu.isa()
    return None


def isa() -> dict[str, Any]:
    """Instruction sets: `compiled`, `available` on this machine, and the one `chosen`.

    Raises `ImportError` without the extension and `ValueError` as `available` does.
    """
    from ropool import _cpu

    return _cpu.isa()


def supports(key: Key, device: Device) -> str | None:
    """`None` when the kernels serve `key`, otherwise why not."""
    if key.dtype not in _DTYPES:
        return f"dtype {key.dtype}: only {', '.join(_DTYPES)}"
    for name, allowed in (
        ("table_dtype", (None, *_DTYPES)),
        ("q_norm_dtype", (None, *_DTYPES)),
        ("k_norm_dtype", (None, *_DTYPES)),
        ("q_out_dtype", (None, key.dtype, *_FP8)),
        ("position_dtype", _INTEGERS),
        ("offset_dtype", _INTEGERS),
        ("slot_dtype", _INTEGERS),
        ("window_map_dtype", _INTEGERS),
    ):
        value = getattr(key, name)
        if value not in allowed:
            return f"{name} {value}: only {', '.join(str(a) for a in allowed if a is not None)}"
    rows = (None, key.dtype, *_FP8)
    if key.pool_dtype not in rows and key.row_format != "fp8_ds_mla":
        return f"pool_dtype {key.pool_dtype}: only {', '.join(str(r) for r in rows if r)}"
    return None
