"""Which of its forms the backend can serve a call in, with its real strides and addresses."""

from __future__ import annotations

from torch import Tensor

from ropool.backends.cuda import shape
from ropool.backends.cuda.launch import ARGUMENTS, describe
from ropool.backends.cuda.specialise import power_of_2
from ropool.dispatch.key import Key, Options

_OLDEST = 90
_MLA_PARTS = {"v": "k_nope", "k": "k_rope"}


def why_not_bulk(
    key: Key, args: tuple[Tensor | None, ...], options: Options, arch: str
) -> str | None:
    """Why the bulk copy engine cannot make this call on `arch`, or `None`."""
    if int(arch.removeprefix("sm_")) < _OLDEST:
        return f"{arch}: the bulk copy engine came with sm_{_OLDEST}"
    places = {name: i for i, names in enumerate(ARGUMENTS[key.op]) for name in names}

    def align(name: str) -> int:
        tensor = args[places[name]]
        assert tensor is not None
        return power_of_2(tensor.data_ptr())

    names = _MLA_PARTS if key.latent_dim else {}
    return shape.why_not_bulk(describe(key, args, options, align), 1, names)
