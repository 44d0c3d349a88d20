"""The registry of kernels that are chosen before a model runs, from a sample of its attention.

A spec says when its kernel is of use and how to build it; which kernel of ropool then serves it is
decided by `ropool.dispatch`, as everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ropool import dispatch
from ropool.dispatch import Device, KernelSpec, Key, Options
from ropool.dispatch.spec import load
from ropool.errors import RopoolError
from ropool.mlx.policy import VARIABLE, custom_rope
from ropool.mlx.rotation import Rotation

logger = logging.getLogger(__name__)

Kernel = Callable[..., tuple[mx.array, ...]]


@dataclass(frozen=True)
class MlxAOTKernelBuildInputs:
    """What a kernel is built from: the attention module of a layer, and the facts of it that are
    static in every call."""

    attention: Any
    """A module of `mlx-lm`; every layer that shares the kernel looks like it."""
    heads_q: int
    heads_kv: int
    head_dim: int
    dtype: str
    """Of the model, as PyTorch names it."""
    page_size: int
    rotation: Rotation
    device: Device
    """`mlx`, with the name of the GPU or of the CPU."""

    def key(self, op: str) -> Key:
        """The key of a call of `op` by such a layer."""
        rotates = op == "rope_store_kv_"
        return Key(
            op=op,
            dtype=self.dtype,
            heads_q=self.heads_q if rotates else 0,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            rotary_dim=self.rotation.dims if rotates else 0,
            interleaved=rotates and self.rotation.interleaved,
            table_dtype="float32" if rotates else None,
            position_dtype="int32" if rotates else None,
            layout="NHD",
            page_size=self.page_size,
            k_dim_group=self.head_dim,
            v_row_group=1,
            pool_dtype=self.dtype,
            slot_dtype="int32",
            write_k=rotates,
        )

    def select(self, op: str) -> KernelSpec:
        """The kernel of ropool that serves `op` here, with `ROPOOL_MLX_CUSTOM_ROPE` in force.
        Raises `NoKernelError` when none does, or the one that was asked for does not."""
        backend = {"1": "metal", "0": "mlx", "auto": None}[custom_rope()]
        return dispatch.select(op, self.device, self.key(op), backend)

    def bind(self, op: str) -> tuple[str, Callable[[tuple[Any, ...]], tuple[mx.array, ...]]]:
        """The selected kernel's label, and its launch."""
        chosen = self.select(op)
        options = Options(interleaved=self.rotation.interleaved)
        return chosen.label, load(chosen.target)(self.key(op), (), options)


@dataclass(frozen=True)
class MlxAOTKernelSpec:
    """How one kernel of a set comes to be."""

    name: str
    """Its attribute in a `MlxAOTKernelSet`."""
    op: str
    """The op of ropool that it is."""
    why_disabled: Callable[[MlxAOTKernelBuildInputs], str | None]
    """`None` when the kernel is of use to the layer, otherwise why not."""
    build: Callable[[MlxAOTKernelBuildInputs], tuple[str, Kernel]]
    """Returns the label of what was built, and the kernel."""


@dataclass(frozen=True)
class MlxAOTKernelSet:
    """The kernels that were built for a layer; a disabled one is `None`, an unknown one raises
    `AttributeError`."""

    kernels: dict[str, Kernel | None] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    """op -> label of the kernel that serves it."""
    inputs: MlxAOTKernelBuildInputs | None = None

    def __getattr__(self, name: str) -> Any:
        kernels: dict[str, Kernel | None] = self.__dict__.get("kernels", {})
        if name not in kernels:
            raise AttributeError(
                f"MlxAOTKernelSet has no kernel {name!r}; registered: {', '.join(kernels)}"
            )
        return kernels[name]


@dataclass(frozen=True)
class MlxAOTKernelContext:
    """The kernels of a step: those of the set, as far as they are worth it at its number of
    tokens."""

    kernels: MlxAOTKernelSet
    rotates: bool
    """Whether the `rope` kernel rotates in this step; otherwise the model does."""

    @classmethod
    def for_step(cls, kernels: MlxAOTKernelSet, tokens: int) -> MlxAOTKernelContext:
        """Decide by the table of the device, and note what was chosen for reports."""
        from ropool.mlx.policy import keeps_built_in

        rope = "rope_store_kv_"
        rotates = kernels.rope is not None
        if rotates and kernels.inputs is not None and custom_rope() == "auto":
            name = kernels.inputs.device.name
            rotates = not keeps_built_in(name, kernels.inputs.key(rope), tokens)
        op = rope if rotates else "store_kv_"
        if op in kernels.labels:
            dispatch.chosen[op] = kernels.labels[op]
        return cls(kernels, rotates)


class MlxAOTKernelRegistry:
    """The kernels that may be built, by name. Registering an equal spec again does nothing; another
    one of the same name raises `ValueError`."""

    def __init__(self) -> None:
        self._specs: dict[str, MlxAOTKernelSpec] = {}

    def __iter__(self) -> Iterator[MlxAOTKernelSpec]:
        return iter(self._specs.values())

    def register(self, spec: MlxAOTKernelSpec) -> None:
        """Make a kernel known."""
        if self._specs.setdefault(spec.name, spec) != spec:
            raise ValueError(
                f"ropool.mlx: kernel {spec.name!r} is registered already, as "
                f"{self._specs[spec.name]}"
            )

    def build_kernel_set(self, inputs: MlxAOTKernelBuildInputs) -> MlxAOTKernelSet:
        """Build every kernel that is of use to the layer, and log what was selected."""
        kernels: dict[str, Kernel | None] = {}
        labels: dict[str, str] = {}
        for spec in self:
            reason = spec.why_disabled(inputs)
            if reason is not None:
                kernels[spec.name] = None
                logger.info("%s: disabled, %s", spec.name, reason)
                continue
            labels[spec.op], kernels[spec.name] = spec.build(inputs)
            logger.info("%s: %s for %s", spec.name, labels[spec.op], inputs.key(spec.op).describe())
        return MlxAOTKernelSet(kernels, labels, inputs)


def _why_no_rope(inputs: MlxAOTKernelBuildInputs) -> str | None:
    setting = custom_rope()
    if setting == "0":
        return "ROPOOL_MLX_CUSTOM_ROPE is 0"
    if inputs.rotation.arguments is None:
        if setting == "1":
            raise RopoolError(
                f"{VARIABLE} is 1, but no kernel can rotate here: {inputs.rotation.reason}; "
                "allowed with this model: auto, 0"
            )
        return inputs.rotation.reason
    if setting == "auto":
        # The built-in operations rotate by the model's own module anyway.
        chosen = inputs.select("rope_store_kv_")
        if chosen.backend == "mlx":
            return dispatch.unavailable("metal") or "no kernel of the metal backend serves it"
    return None


def _build_rope(inputs: MlxAOTKernelBuildInputs) -> tuple[str, Kernel]:
    label, launch = inputs.bind("rope_store_kv_")

    def rope(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        k_pool: mx.array,
        v_pool: mx.array,
        rotation: Rotation,
        positions: mx.array,
        slots: mx.array,
    ) -> tuple[mx.array, ...]:
        return launch((q, k, v, k_pool, v_pool, rotation, positions, slots))

    return label, rope


def _build_store(inputs: MlxAOTKernelBuildInputs) -> tuple[str, Kernel]:
    label, launch = inputs.bind("store_kv_")

    def kv_store(
        k: mx.array, v: mx.array, k_pool: mx.array, v_pool: mx.array, slots: mx.array
    ) -> tuple[mx.array, ...]:
        return launch((k, v, k_pool, v_pool, slots))

    return label, kv_store


registry = MlxAOTKernelRegistry()
registry.register(MlxAOTKernelSpec("rope", "rope_store_kv_", _why_no_rope, _build_rope))
# For models that rotate by themselves, and for steps in which the table lets them.
registry.register(MlxAOTKernelSpec("kv_store", "store_kv_", lambda inputs: None, _build_store))
