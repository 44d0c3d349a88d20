"""Checks of a call's metadata. Every dimension is named once and bound on first use, so that a
mismatch can name both arguments; nothing here reads a tensor's data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ropool.dispatch.key import Options
from ropool.layouts import KVLayout, PlaneView, describe_dims, plane_view

MODEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
INDEX_DTYPES = (torch.int32, torch.int64)

_NOUNS = {
    "T": "tokens",
    "Hq": "heads",
    "Hk": "heads",
    "D": "dims a head",
    "Dv": "dims a head",
    "L": "latent dims",
    "R": "rotary dims",
}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(dtype_name(dtype) for dtype in dtypes)


class Checker:
    """Checks the arguments of one call of `op`; the first tensor given decides the device."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, tuple[int, str]] = {}
        self.device: torch.device | None = None
        self.device_owner = ""

    def fail(self, message: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"ropool.{self.op}: {message}")

    def size(self, symbol: str) -> int:
        """The size that `symbol` was bound to."""
        return self.sizes[symbol][0]

    def _on_device(self, name: str, tensor: Tensor) -> None:
        if self.device is None:
            self.device, self.device_owner = tensor.device, name
        elif tensor.device != self.device:
            self.fail(f"{name} is on {tensor.device}, {self.device_owner} is on {self.device}")

    def dtype(self, name: str, tensor: Tensor, allowed: Iterable[torch.dtype]) -> None:
        if tensor.dtype not in allowed:
            self.fail(
                f"{name} is {dtype_name(tensor.dtype)}, expected {dtype_names(allowed)}", TypeError
            )

    def tensor(
        self,
        name: str,
        tensor: Tensor,
        dims: Sequence[str],
        dtypes: Iterable[torch.dtype],
        *,
        written: bool = False,
    ) -> None:
        """Check rank, sizes, dtype, device and that the last dimension is contiguous; `written`
        tensors must not overlap themselves."""
        self._on_device(name, tensor)
        if tensor.dim() != len(dims):
            self.fail(f"{name} must be [{', '.join(dims)}], got shape {list(tensor.shape)}")
        self.dtype(name, tensor, dtypes)
        for position, symbol in enumerate(dims):
            got = tensor.shape[position]
            if symbol not in self.sizes:
                self.sizes[symbol] = (got, name)
                continue
            expected, owner = self.sizes[symbol]
            if got != expected:
                noun = _NOUNS.get(symbol, f"in dimension {symbol}")
                self.fail(f"{name} has {got} {noun}, {owner} has {expected}")
        self.strides(name, tensor, written=written)

    def strides(self, name: str, tensor: Tensor, *, written: bool) -> None:
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            self.fail(
                f"{name} must be contiguous in its last dimension, "
                f"got strides {list(tensor.stride())}"
            )
        if written and any(
            size > 1 and stride == 0
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            self.fail(
                f"{name} is written but overlaps itself: shape {list(tensor.shape)}, "
                f"strides {list(tensor.stride())}"
            )

    def model_dtype(self, name: str, tensor: Tensor) -> tuple[torch.dtype]:
        """The storage dtype that Q, K and V share, as `tensor` has it."""
        self.dtype(name, tensor, MODEL_DTYPES)
        return (tensor.dtype,)

    def grouped(self) -> None:
        heads_q, heads_kv = self.size("Hq"), self.size("Hk")
        if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv != 0:
            self.fail(
                f"q has {heads_q} heads, k has {heads_kv}: "
                "the first must be a multiple of the second"
            )

    def rotary(
        self,
        options: Options,
        cos_sin_cache: Tensor,
        positions: Tensor,
        offsets: Tensor | None,
        model: tuple[torch.dtype],
        width: int,
        owner: str,
        *,
        whole: bool = False,
    ) -> None:
        """Check the table, the positions and the M-RoPE options for heads of `width` dims; with
        `whole` all of them must be rotated."""
        self.tensor(
            "cos_sin_cache",
            cos_sin_cache,
            ("max_position", "table"),
            dict.fromkeys((torch.float32, *model)),
        )
        rotary_dim = cos_sin_cache.shape[1]
        if rotary_dim % 2 or rotary_dim < 2:
            self.fail(
                f"cos_sin_cache has {rotary_dim} columns, expected an even number of at least 2"
            )
        if rotary_dim > width or (whole and rotary_dim != width):
            self.fail(f"cos_sin_cache has {rotary_dim} columns, {owner} has {width} dims")
        section = options.mrope_section
        if section is None:
            if options.mrope_interleaved:
                self.fail("mrope_interleaved needs mrope_section")
            self.tensor("positions", positions, ("T",), INDEX_DTYPES)
        else:
            if (
                len(section) != 3
                or any(part < 0 for part in section)
                or sum(section) != rotary_dim // 2
            ):
                self.fail(
                    f"mrope_section is {tuple(section)}, "
                    f"expected 3 sizes that add up to {rotary_dim // 2} (R / 2)"
                )
            self.tensor("positions", positions, ("3", "T"), INDEX_DTYPES)
            if positions.shape[0] != 3:
                self.fail(
                    "positions must be [3, T] with mrope_section, "
                    f"got shape {list(positions.shape)}"
                )
        if offsets is not None:
            self.tensor("offsets", offsets, ("T",), INDEX_DTYPES)

    def norm(self, name: str, weight: Tensor | None, model: tuple[torch.dtype]) -> None:
        if weight is not None:
            self.tensor(name, weight, ("D",), dict.fromkeys((torch.float32, *model)))

    def norm_eps(self, eps: float) -> None:
        if not 0 <= eps <= _FLOAT32_MAX:
            self.fail(f"norm_eps is {eps!r}, expected a float32 number of at least 0")

    def scale(
        self, name: str, scale: Tensor | None, heads: str | None, target: str, dtype: torch.dtype
    ) -> None:
        """Check an fp8 scale: one value, or one for each of `heads`; `target` names the tensor it
        belongs to."""
        if scale is None:
            return
        if dtype not in FP8_DTYPES:
            self.fail(f"{name} needs an fp8 {target}, which is {dtype_name(dtype)}")
        self._on_device(name, scale)
        self.dtype(name, scale, (torch.float32,))
        allowed = [(), (1,)] + ([(self.size(heads),)] if heads else [])
        if tuple(scale.shape) not in allowed:
            shapes = " or ".join(str(list(shape)) for shape in allowed)
            self.fail(f"{name} has shape {list(scale.shape)}, expected {shapes}")
        self.strides(name, scale, written=False)

    def query_out(
        self, q_out: Tensor | None, q_scale: Tensor | None, width: str, model: tuple[torch.dtype]
    ) -> None:
        if q_out is not None:
            self.tensor("q_out", q_out, ("T", "Hq", width), model + FP8_DTYPES, written=True)
            self.scale("q_scale", q_scale, "Hq", "q_out", q_out.dtype)
        elif q_scale is not None:
            self.fail("q_scale needs q_out")

    def slots(self, options: Options, slot_mapping: Tensor, window_slot_map: Tensor | None) -> None:
        self.tensor("slot_mapping", slot_mapping, ("T",), INDEX_DTYPES)
        if window_slot_map is not None:
            self.tensor("window_slot_map", window_slot_map, ("N",), INDEX_DTYPES)

    def kv_pool(
        self, layout: KVLayout, k_pool: Tensor, v_pool: Tensor, model: tuple[torch.dtype]
    ) -> tuple[PlaneView, PlaneView]:
        """Check both pool tensors against `k`, `v` and each other."""
        views = []
        for part, pool, width in (("k", k_pool, "D"), ("v", v_pool, "Dv")):
            name = f"{part}_pool"
            self._on_device(name, pool)
            self.dtype(name, pool, model + FP8_DTYPES)
            self.strides(name, pool, written=True)
            try:
                view = plane_view(layout, part, pool.shape, pool.stride())
            except ValueError as error:
                self.fail(f"{name} does not fit layout {layout}: {error}")
            if view.heads != self.size("Hk"):
                self.fail(f"{name} has {view.heads} heads, k has {self.size('Hk')}")
            if view.head_dim != self.size(width):
                self.fail(
                    f"{name} {describe_dims(layout, part)} has {view.head_dim} dims a head, "
                    f"{part} has {self.size(width)}"
                )
            views.append(view)
        k_view, v_view = views
        if k_pool.dtype != v_pool.dtype:
            self.fail(
                f"v_pool is {dtype_name(v_pool.dtype)}, k_pool is {dtype_name(k_pool.dtype)}",
                TypeError,
            )
        if (k_view.pages, k_view.page_size) != (v_view.pages, v_view.page_size):
            self.fail(
                f"v_pool has {v_view.pages} pages of {v_view.page_size} tokens, "
                f"k_pool has {k_view.pages} of {k_view.page_size}"
            )
        return k_view, v_view

    def mla_pool(self, pool: Tensor, scale: Tensor | None, model: tuple[torch.dtype]) -> str:
        """Check an MLA pool `[S, W]` or `[P, B, W]`; returns its row format."""
        self._on_device("pool", pool)
        self.dtype("pool", pool, (*model, *FP8_DTYPES, torch.uint8))
        if pool.dim() not in (2, 3):
            self.fail(f"pool must be [S, W] or [P, B, W], got shape {list(pool.shape)}")
        self.strides("pool", pool, written=True)
        latent, rope, width = self.size("L"), self.size("R"), pool.shape[-1]
        if pool.dtype == torch.uint8:
            if (latent, rope, width) != (512, 64, 656):
                self.fail(
                    "a uint8 pool holds 656-byte rows (fp8_ds_mla) of 512 latent and 64 rope dims, "
                    f"got rows of {width} bytes with {latent} latent and {rope} rope dims"
                )
            if scale is not None:
                self.fail("scale must be None for 656-byte rows, which carry their own scales")
            return "fp8_ds_mla"
        if width != latent + rope:
            self.fail(f"pool has rows of {width}, k_nope and k_rope have {latent} + {rope} dims")
        self.scale("scale", scale, None, "pool", pool.dtype)
        return "model" if pool.dtype in MODEL_DTYPES else "fp8"


_FLOAT32_MAX = torch.finfo(torch.float32).max
_FLAG = ("a bool", lambda value: isinstance(value, bool))
_OPTION_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "interleaved": _FLAG,
    "mrope_interleaved": _FLAG,
    "write_k": _FLAG,
    "layout": ("a str", lambda value: isinstance(value, str)),
    "backend": ("a str or None", lambda value: value is None or isinstance(value, str)),
    "norm_eps": ("a number", lambda value: isinstance(value, int | float)),
    "padding_slot": (
        "a 64-bit int or None",
        lambda value: value is None or (isinstance(value, int) and -(2**63) <= value < 2**63),
    ),
    "mrope_section": (
        "3 ints or None",
        lambda value: (
            value is None
            or (isinstance(value, tuple) and all(isinstance(part, int) for part in value))
        ),
    ),
}


def wrong_option(name: str, value: object) -> str | None:
    """What option `name` may be, when `value` is of another type."""
    expected, fits = _OPTION_TYPES[name]
    return None if fits(value) else expected


def scale_kind(scale: Tensor | None) -> str | None:
    """`Key`'s word for a scale: one value for the tensor, or one a head."""
    if scale is None:
        return None
    return "tensor" if scale.numel() == 1 else "head"


def optional_dtype(tensor: Tensor | None) -> str | None:
    return None if tensor is None else dtype_name(tensor.dtype)


def pool_slots(k_pool: Tensor, layout: KVLayout) -> int:
    """`S`, the slots of a pool whose K tensor is `k_pool`."""
    view = plane_view(layout, "k", k_pool.shape, k_pool.stride())
    return view.pages * view.page_size
