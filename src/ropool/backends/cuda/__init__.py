"""The `cuda` backend: CUDA C++ specialised on the key and compiled by NVRTC through `cuda.core`, so
that a user needs neither the CUDA toolkit nor a host compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ropool.dispatch.key import Key
    from ropool.dispatch.spec import Device

_FP8 = ("float8_e4m3fn", "float8_e5m2")


def available() -> str | None:
    """`None` when the kernels can be compiled and run in this process, otherwise why not."""
    import torch

    if torch.version.cuda is None:
        return "this build of PyTorch has no CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        import cuda.core  # noqa: F401

        from ropool.backends.cuda import compile, driver

        compile.compiler_version()
        driver.library()
    except (ImportError, OSError, RuntimeError) as error:
        return f"cuda.core with NVRTC is not there ({error}); install ropool[cuda]"
    return None


def supports(key: Key, device: Device) -> str | None:
    """`None` when the kernels serve `key` on `device`, otherwise why not."""
    if int(device.arch.removeprefix("sm_")) < 80:
        return f"{device.arch}: only sm_80 and later"
    for name in ("pool_dtype", "q_out_dtype"):
        value = getattr(key, name)
        if value not in (None, key.dtype, *_FP8) and key.row_format != "fp8_ds_mla":
            return f"{name} {value}: only {', '.join((key.dtype, *_FP8))}"
    return None
