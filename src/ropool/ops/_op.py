"""The way from a public function to a kernel, the same for every op.

An eager call costs one look-up: everything that can be decided from metadata (validation, the key,
the kernel, its bound launch) is decided on the first call with given options and metadata, and
remembered. Compiled code makes that look-up and starts the launch (`ropool.ops._eager`); what it
does not find comes here. A call that PyTorch has to see (compilation, fake tensors, tracing,
profiling) goes through the registered torch op, whose kernel is the same path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ropool.dispatch import cache
from ropool.dispatch.key import Key, Options
from ropool.dispatch.select import KernelReport, explain, select
from ropool.dispatch.settings import current
from ropool.dispatch.spec import Args, Device, Launch, load
from ropool.layouts import KVLayout
from ropool.ops._device import device_of
from ropool.ops._eager import MODES, connect
from ropool.ops._launches import launches
from ropool.ops._validate import wrong_option

_PLAIN = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("ropool", "DEF")

_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled


def _nothing(args: Args) -> None:
    """The launch of a call with no tokens."""


OVERLOADS = {
    (False, False): "",
    (False, True): "q_out",
    (True, False): "write_k",
    (True, True): "q_out_write_k",
}
"""`(write_k, q_out given)` -> overload of the torch op, for the ops that have both options."""


def overload_of(write_k: bool, q_out: Tensor | None) -> str:
    """The overload that writes what a call writes."""
    return OVERLOADS.get((write_k, q_out is not None), "")


def hashable(value: Any) -> Any:
    """An option as part of a signature: a list becomes a tuple."""
    return tuple(value) if isinstance(value, list) else value


class Op:
    """One op: its name, its public function, its tensors in the order in which kernels get them,
    and how a call is validated and keyed.

    `tensors` names them, optional ones with a `?` behind; the first has a row a token. `key(args,
    options)` validates a call and returns its `Key`; `check(args, options)` does the checks of
    `ROPOOL_CHECK`. `schemas` has a torch schema for each overload, since a schema must say exactly
    which arguments are written.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        *,
        tensors: tuple[str, ...],
        options: tuple[str, ...],
        schemas: dict[str, str],
        key: Callable[[Args, Options], Key],
        check: Callable[[Args, Options], None],
    ) -> None:
        self.name = name
        self.tensors = tuple(tensor.rstrip("?") for tensor in tensors)
        self._required = tuple(not tensor.endswith("?") for tensor in tensors)
        self.option_names = options
        self._key = key
        self._check = check
        self.launches = launches(len(tensors), len(options))
        cache.remember(self.launches)
        self.entry = connect(function, self.launches, (*self.tensors, *options, "backend"))
        """The compiled way of the public function, `None` without one."""
        for overload, schema in schemas.items():
            qualified = f"{name}.{overload}" if overload else name
            _LIBRARY.define(qualified + " ".join(schema.split()))
            _LIBRARY.impl(qualified, self._run_registered, "CompositeExplicitAutograd")
            torch.library.register_fake(f"ropool::{qualified}", self._run_fake, lib=_LIBRARY)
        packet = getattr(torch.ops.ropool, name)
        self._overloads = {overload: getattr(packet, overload or "default") for overload in schemas}
        for overload, registered in self._overloads.items():
            qualified = f"{name}.{overload}" if overload else name
            _LIBRARY.impl(qualified, self._below_autograd(registered), "Autograd")

    def __call__(
        self, args: Args, options: tuple[Any, ...], backend: str | None, overload: str = ""
    ) -> None:
        """Run the op on `args`; `options` are in the order of `option_names`."""
        if _is_compiling() or self._seen_by_torch(args):
            self._overloads[overload](*args, *options, backend)
            return
        self._run(args, options, backend)

    @staticmethod
    def _seen_by_torch(args: Args) -> bool:
        """Whether PyTorch has to see this call; plain tensors outside of any mode need not."""
        return any(
            type(tensor) not in _PLAIN and isinstance(tensor, Tensor) for tensor in args
        ) or any(mode() for mode in MODES)

    def _run(self, args: Args, options: tuple[Any, ...], backend: str | None) -> None:
        launch = self.launches.find(args, options, backend)
        if launch is None:
            cache.make_room(self.launches)
            epoch = self.launches.epoch()
            _, launch = self.bind(args, options, backend)
            self.launches.keep(args, options, backend, launch, epoch)
        launch(args)

    def _below_autograd(self, registered: Callable[..., None]) -> Callable[..., None]:
        """What autograd does with a call: without it a gradient would silently skip the op."""

        def call(*values: Any) -> None:
            self._refuse_gradients(values[: len(self.tensors)])
            with torch._C._AutoDispatchBelowAutograd():
                registered(*values)

        return call

    def _refuse_gradients(self, args: Args) -> None:
        name = self._needing_grad(args)
        if name is not None:
            raise RuntimeError(
                f"ropool.{self.name}: {name} requires grad, but the op has no backward; "
                "call it under torch.no_grad() or torch.inference_mode()"
            )

    def _needing_grad(self, args: Args) -> str | None:
        """The first tensor that a backward pass would need a gradient for."""
        if _grad_enabled():
            for name, tensor in zip(self.tensors, args, strict=True):
                if tensor is not None and tensor.requires_grad:
                    return name
        return None

    def key(self, args: Args, options: tuple[Any, ...], backend: str | None) -> tuple[Key, Options]:
        """Validate a call; its key, and its options by name."""
        self._check_types(args, options, backend)
        named = self._options(options)
        return self._key(args, named), named

    def bind(self, args: Args, options: tuple[Any, ...], backend: str | None) -> tuple[str, Launch]:
        """Validate a call; the label of its kernel (empty when there is nothing to do), and its
        launch. A launch may have a `freeze(args)`, which makes a launch of no arguments for
        tensors that stay where they are."""
        key, named = self.key(args, options, backend)
        self._refuse_gradients(args)
        device = args[0].device
        if device.type == "meta":
            return "", _nothing
        spec = select(self.name, device_of(device), key, backend)
        if args[0].shape[0] == 0:
            return "", _nothing
        launch: Launch = load(spec.target)(key, args, named)
        cache.chosen[self.name] = spec.label
        if not current().check:
            return spec.label, launch

        def checked(args: Args) -> None:
            self._check(args, named)
            launch(args)

        return spec.label, checked

    def explain(
        self, args: Args, options: tuple[Any, ...], backend: str | None
    ) -> list[KernelReport]:
        """Every kernel of this op, with chosen or why not for this call."""
        key, _ = self.key(args, options, backend)
        device: Device = device_of(args[0].device)
        return explain(self.name, device, key, backend)

    def _options(self, options: tuple[Any, ...]) -> Options:
        named = Options(**dict(zip(self.option_names, options, strict=True)))
        try:
            return named._replace(layout=KVLayout(named.layout))
        except ValueError:
            known = ", ".join(KVLayout)
            raise ValueError(
                f"ropool.{self.name}: layout is {named.layout!r}; known: {known}"
            ) from None

    def _check_types(self, args: Args, options: tuple[Any, ...], backend: str | None) -> None:
        for name, required, value in zip(self.tensors, self._required, args, strict=True):
            if not isinstance(value, Tensor) and (required or value is not None):
                raise TypeError(
                    f"ropool.{self.name}: {name} must be a torch.Tensor, got {type(value).__name__}"
                )
            if value is not None and value.is_neg():
                raise ValueError(
                    f"ropool.{self.name}: {name} is a lazily negated view, expected plain memory: "
                    "tensor.resolve_neg()"
                )
        for name, value in (*zip(self.option_names, options, strict=True), ("backend", backend)):
            expected = wrong_option(name, value)
            if expected:
                raise TypeError(f"ropool.{self.name}: {name} is {value!r}, expected {expected}")

    def _run_registered(self, *values: Any) -> None:
        self._run(*self._split(values))

    def _run_fake(self, *values: Any) -> None:
        args, options, backend = self._split(values)
        self.key(args, options, backend)

    def _split(self, values: tuple[Any, ...]) -> tuple[Args, tuple[Any, ...], str | None]:
        """The torch op's arguments as tensors, options and backend; lists become hashable."""
        count = len(self.tensors)
        options = tuple(map(hashable, values[count:-1]))
        return values[:count], options, values[-1]
