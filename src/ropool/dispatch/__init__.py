"""Which kernel runs, and why: metadata only, no backend is imported before its first use."""

from ropool.dispatch import catalog
from ropool.dispatch.cache import chosen
from ropool.dispatch.key import Key, Options
from ropool.dispatch.registry import OPS, backends, kernels, register, register_backend, unavailable
from ropool.dispatch.select import KernelReport, NoKernelError, explain, select
from ropool.dispatch.spec import BackendSpec, Device, KernelSpec

catalog.register_all()

__all__ = [
    "OPS",
    "BackendSpec",
    "Device",
    "KernelReport",
    "KernelSpec",
    "Key",
    "NoKernelError",
    "Options",
    "backends",
    "chosen",
    "explain",
    "kernels",
    "register",
    "register_backend",
    "select",
    "unavailable",
]
