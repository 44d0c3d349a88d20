"""The `triton` backend: one source for AMD, Intel and NVIDIA GPUs, specialised by key.

Triton is imported only where there is a GPU, or when its interpreter was asked for.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ropool.dispatch.key import Key
    from ropool.dispatch.spec import Device

_OLDEST = (3, 6)
_MODEL = ("float16", "bfloat16", "float32")
_FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, as it was told before it was imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def available() -> str | None:
    """`None` when the kernels can run here, otherwise why not."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # a folder of that name is no package
        return "triton is not installed"
    if not (interpreting() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "there is no GPU that torch can use (TRITON_INTERPRET=1 interprets the kernels)"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"triton {triton.__version__} is too old, {oldest} or later is needed"
    return None


def supports(key: Key, device: Device) -> str | None:
    """`None` when the kernels serve `key` on `device`, otherwise why not."""
    if interpreting() != (device.kind == "cpu"):
        on = "cpu tensors only" if interpreting() else "GPUs only"
        return f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')}: {on}"
    if key.dtype not in _MODEL:
        return f"dtype {key.dtype}: only {', '.join(_MODEL)}"
    for name in ("pool_dtype", "q_out_dtype"):
        value = getattr(key, name)
        known = (None, key.dtype, *_FP8)
        if value not in known and key.row_format != "fp8_ds_mla":
            return f"{name} {value}: only {', '.join(str(k) for k in known if k)}"
    return None
