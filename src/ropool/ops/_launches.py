"""The launches that an op remembers, looked up by what of a call decides its launch: options, and
the shapes, strides, dtypes, devices and kinds of its tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Protocol

import torch

from ropool.dispatch.spec import Args, Launch

native: Any
"""The compiled extension, `None` where it is not installed."""
try:
    from ropool import _eager as native
except ImportError:
    native = None

_FUNCTIONS = (
    *("get_layout", "get_dim", "get_sizes", "get_strides", "get_dtype"),
    *("get_device_type", "get_device_index", "get_data_ptr", "grad_mode_is_enabled"),
)
"""What compiled code asks PyTorch for, of its functions `aoti_torch_*`: the C interface that
PyTorch keeps for code compiled ahead of time (torch/csrc/inductor/aoti_torch/c/shim.h)."""


@functools.cache
def reader() -> Any:
    """How compiled code reads tensors, `None` where it cannot: without the extension, or with a
    PyTorch that does not have these functions."""
    if native is None:
        return None
    folder = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    plain = torch.zeros(2, 3, device="cpu")
    tensors = (plain.t(), torch.nn.Parameter(plain), torch._neg_view(plain))
    try:
        [path] = (folder / name for name in names if (folder / name).exists())
        library = ctypes.CDLL(str(path))
        functions = {
            name: ctypes.cast(getattr(library, f"aoti_torch_{name}"), ctypes.c_void_p).value or 0
            for name in _FUNCTIONS
        }
        return native.Torch(
            functions,
            [
                (tensor, tensor._cdata, torch._C._dispatch_keys(tensor).raw_repr())
                for tensor in tensors
            ],
        )
    except (AttributeError, OSError, ValueError):
        return None


class Launches(Protocol):
    """A call that cannot be looked up, because an argument is of an unusual kind or a tensor needs
    a gradient, is never found and never kept."""

    def find(self, args: Args, options: tuple[Any, ...], backend: str | None) -> Launch | None:
        """The launch of an equal call."""

    def epoch(self) -> Any:
        """What `keep` asks for: read before a launch is bound, it tells whether all were forgotten
        since."""

    def keep(
        self,
        args: Args,
        options: tuple[Any, ...],
        backend: str | None,
        launch: Launch,
        epoch: Any,
    ) -> None:
        """Remember `launch` for equal calls, unless all were forgotten after `epoch`: another
        thread has changed what it was bound by."""

    def clear(self) -> None:
        """Forget all."""

    def __len__(self) -> int: ...


class ByAttributes:
    """Launches in a dictionary: tensors are read attribute by attribute."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Launch] = {}

    def find(self, args: Args, options: tuple[Any, ...], backend: str | None) -> Launch | None:
        try:
            return self._kept.get(_signature(args, options, backend))
        except _UNUSUAL:
            return None

    def epoch(self) -> Any:
        return self._kept

    def keep(
        self,
        args: Args,
        options: tuple[Any, ...],
        backend: str | None,
        launch: Launch,
        epoch: Any,
    ) -> None:
        with contextlib.suppress(*_UNUSUAL):
            epoch[_signature(args, options, backend)] = launch

    def clear(self) -> None:
        self._kept = {}

    def __len__(self) -> int:
        return len(self._kept)


_UNUSUAL = (AttributeError, RuntimeError, TypeError, ValueError)


def _signature(args: Args, options: tuple[Any, ...], backend: str | None) -> Hashable:
    """Raises one of `_UNUSUAL` for a call that cannot be looked up."""
    tensors = [tensor for tensor in args if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("needs a gradient")
    metadata = tuple(
        None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.layout, t.is_neg())
        for t in args
    )
    return options, tuple(map(type, options)), backend, metadata


def launches(tensors: int, options: int) -> Launches:
    """What remembers the launches of an op with so many tensors and options: compiled, where
    compiled code can read tensors."""
    if reader() is None:
        return ByAttributes()
    return native.Launches(tensors, options, reader(), torch.Tensor, torch.nn.Parameter)
