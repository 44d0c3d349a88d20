"""The kernels that come with ropool."""

from __future__ import annotations

from ropool.dispatch.registry import OPS, register, register_backend
from ropool.dispatch.spec import BackendSpec, KernelSpec

ANY_DEVICE = ("cpu", "cuda", "hip", "xpu", "mps")


def register_all() -> None:
    """Register the built-in backends and kernels; no backend is imported."""
    register_backend(BackendSpec("cpu", "ropool.backends.cpu:available"))
    register_backend(BackendSpec("reference", "ropool.backends.reference:available"))
    register_backend(
        BackendSpec(
            "triton",
            "ropool.backends.triton:available",
            "ropool.backends.triton.plan:check_tuning",
        )
    )
    register_backend(
        BackendSpec(
            "cuda", "ropool.backends.cuda:available", "ropool.backends.cuda.choose:check_tuning"
        )
    )
    register_backend(
        BackendSpec(
            "metal", "ropool.backends.metal:available", "ropool.backends.metal:check_tuning"
        )
    )
    register_backend(BackendSpec("mlx", "ropool.backends.mlx:available"))
    for backend, priority in (("metal", 100), ("mlx", 0)):
        for op in ("rope_store_kv_", "store_kv_"):
            register(
                KernelSpec(
                    op=op,
                    name=op.rstrip("_"),
                    backend=backend,
                    target=f"ropool.backends.{backend}.launch:{op}",
                    devices=("mlx",),
                    supports=f"ropool.backends.{backend}:supports",
                    priority=priority,
                )
            )
    for op in OPS:
        register(
            KernelSpec(
                op=op,
                name=op.rstrip("_"),
                backend="cuda",
                target="ropool.backends.cuda.launch:bind",
                devices=("cuda",),
                supports="ropool.backends.cuda:supports",
                priority=100,
            )
        )
        register(
            KernelSpec(
                op=op,
                name=op.rstrip("_"),
                backend="cpu",
                target=f"ropool.backends.cpu.launch:{op}",
                devices=("cpu",),
                supports="ropool.backends.cpu:supports",
                priority=100,
            )
        )
        register(
            KernelSpec(
                op=op,
                name=op.rstrip("_"),
                backend="reference",
                target=f"ropool.backends.reference.launch:{op}",
                devices=ANY_DEVICE,
                supports="ropool.backends.reference:supports",
            )
        )
        for name, devices, priority in (
            (op.rstrip("_"), ("cuda", "hip", "xpu"), 50),
            # Triton's interpreter is for tests: never the default.
            (f"{op.rstrip('_')}_interpreted", ("cpu",), -1),
        ):
            register(
                KernelSpec(
                    op=op,
                    name=name,
                    backend="triton",
                    target="ropool.backends.triton.launch:bind",
                    devices=devices,
                    supports="ropool.backends.triton:supports",
                    priority=priority,
                )
            )
