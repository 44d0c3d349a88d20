"""What of a call's tensors decides its launch: shapes, strides, dtypes and devices, as something to
look up by."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from ropool.dispatch.spec import Args


def described(args: Args) -> Hashable:
    """The metadata of the tensors in `args`, read attribute by attribute."""
    return tuple(
        None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for tensor in args
    )


def _reader() -> Callable[[Args], Hashable]:
    """The compiled reader, several times faster, where it is installed and PyTorch publishes the
    exchange API that it needs."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if api is None:
        return described
    try:
        from ropool import _signature

        return _signature.Reader(torch.Tensor, api).read
    except (ImportError, ValueError):
        return described


metadata = _reader()
"""The metadata of the tensors in a call's arguments. Raises, whatever the reason, when one of them
is no plain tensor."""
