"""What a call needs of the kernel: the constants it is compiled with, and the addresses and scalars
that it is launched with.

Vector widths follow from sizes, strides and addresses, so that any view is served and aligned ones
with 16-byte accesses.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ropool.dispatch.key import Key, Options
from ropool.layouts import PlaneView, plane_view

VECTOR_BYTES = 16
LONG_VECTOR_BYTES = 32
"""What sm_100 and later move at once, in rows that are stored as they came."""
TILE = 128
"""Latents of the 656-byte row that share a scale."""

_FORMATS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "Bf16",
    "float8_e4m3fn": "E4m3",
    "float8_e5m2": "E5m2",
}
_INTEGERS = {"int32": "int", "int64": "i64"}
SIZES = {"F32": 4, "F16": 2, "Bf16": 2, "E4m3": 1, "E5m2": 1}
_SCALES = {None: 0, "tensor": 1, "head": 2}

POINTERS = (
    *("q", "k", "v", "k_pool", "v_pool", "table", "positions", "slots", "offsets"),
    *("q_norm", "k_norm", "k_scale", "v_scale", "q_out", "q_scale", "window"),
)
SCALARS = (
    *("tokens", "q_token", "q_head", "k_token", "k_head", "v_token", "v_head"),
    *("q_out_token", "q_out_head", "table_row", "position_stream", "max_position"),
    *("k_page", "k_row_group", "k_row", "k_dim_group", "k_plane"),
    *("v_page", "v_row_group", "v_row", "v_dim_group", "v_plane"),
    *("pool_slots", "window_size", "padding_slot", "norm_eps"),
)

Align = Callable[[str], int]
"""Pointer name -> a power of two up to the device's longest vector that its address is a multiple
of."""


@dataclass
class Call:
    """One call of an op as the kernel sees it. `pointers` are `(name, index in the op's
    arguments)`; the kernel's `Params` holds them, then `scalars`, in order."""

    key: Key
    tokens: int
    pointers: list[tuple[str, int]] = field(default_factory=list)
    scalars: dict[str, int] = field(default_factory=dict)
    integers: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    row_align: dict[str, int] = field(default_factory=dict)
    """`k`, `v` -> bytes that every row's address is a multiple of."""


def power_of_2(*multiples: int, most: int = VECTOR_BYTES) -> int:
    """The largest power of two that divides all of `multiples`; `most` is one and the limit."""
    common = math.gcd(most, *multiples)
    return common & -common


def _strides(tensor: Tensor) -> list[int]:
    """Strides in elements, 0 for dimensions of one element, whose strides mean nothing."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride if size > 1 else 0 for size, stride in pairs]


def _add_rows(call: Call, name: str, tensor: Tensor) -> tuple[int, int]:
    """Add the strides of `[T, heads, dims]` or `[T, dims]`; returns them."""
    token, *head, _ = _strides(tensor)
    call.scalars[f"{name}_token"] = token
    call.scalars[f"{name}_head"] = head[0] if head else 0
    return token, head[0] if head else 0


def _row_width(size: int, align: int, dims: int, half: int, strides: Sequence[int]) -> int:
    """Elements of a vector that cuts rows of `dims` elements, and half of their rotary part, into
    whole aligned vectors."""
    aligned = power_of_2(align, *(stride * size for stride in strides)) // size
    return math.gcd(max(aligned, 1), dims, half) & -math.gcd(max(aligned, 1), dims, half)


def _format(tensor: Tensor) -> str:
    return _FORMATS[str(tensor.dtype).removeprefix("torch.")]


class Describer:
    """Builds a `Call` from an op's arguments, given by their names in the kernel (`None` where
    the kernel has no such argument)."""

    def __init__(
        self, key: Key, names: Sequence[Sequence[str]], args: Sequence[Tensor | None], align: Align
    ) -> None:
        first = args[0]
        assert first is not None
        self.call = Call(key, first.shape[0])
        self.align = align
        self.tensors: dict[str, Tensor] = {}
        for index, (aliases, tensor) in enumerate(zip(names, args, strict=True)):
            if tensor is None:
                continue
            for name in aliases:
                self.tensors[name] = tensor
                self.call.pointers.append((name, index))
        self.call.scalars["tokens"] = self.call.tokens
        self.call.formats["Model"] = _FORMATS[key.dtype]
        self.size = SIZES[_FORMATS[key.dtype]]

    def constants(self, **values: int | bool) -> None:
        self.call.integers.update({name: int(value) for name, value in values.items()})

    def queries(self, heads: int, dims: int, rotary: int) -> None:
        """Rotated rows `q`, in place or to `q_out`."""
        tensors = self.tensors
        if "q" not in tensors:
            self.constants(HQ=0)
            return
        strides = _add_rows(self.call, "q", tensors["q"])
        width = _row_width(self.size, self.align("q"), dims, rotary // 2, strides)
        self.constants(HQ=heads, VQ=width)
        if "q_out" in tensors:
            out = tensors["q_out"]
            strides = _add_rows(self.call, "q_out", out)
            self.call.formats["QOut"] = _format(out)
            aligned = power_of_2(
                self.align("q_out"), *(stride * out.element_size() for stride in strides)
            )
            self.constants(Q_OUT=1, Q_OUT_ALIGN=aligned, Q_SCALE=_SCALES[self.call.key.q_scale])
        self._norm("q", "QNorm")

    def _norm(self, part: str, name: str) -> None:
        weight = self.tensors.get(f"{part}_norm")
        if weight is None:
            return
        self.call.formats[name] = _format(weight)
        width = max(self.align(f"{part}_norm") // weight.element_size(), 1)
        self.constants(**{f"{part.upper()}_NORM": 1, f"{part.upper()}_NORM_WIDTH": width})

    def keys_and_values(
        self, heads_k: int, dims: int, rotary: int, heads_v: int, v_dims: int, v_head: int = 0
    ) -> None:
        """Rows `k` and `v`; `v_head` replaces the head stride where one row is cut into heads."""
        tensors = self.tensors
        if "k" not in tensors:
            self.constants(HK=0, HV=0)
            return
        strides = _add_rows(self.call, "k", tensors["k"])
        k_width = _row_width(self.size, self.align("k"), dims, rotary // 2, strides)
        self.constants(HK=heads_k, HV=heads_v, DV=v_dims, VK=k_width)
        self.call.row_align["k"] = power_of_2(self.align("k"), *(s * self.size for s in strides))
        self._norm("k", "KNorm")
        if "v" not in tensors:
            return
        token, head = _add_rows(self.call, "v", tensors["v"])
        if v_head:
            self.call.scalars["v_head"] = head = v_head
        v_width = _row_width(self.size, self.align("v"), v_dims, 0, (token, head))
        self.call.row_align["v"] = power_of_2(self.align("v"), token * self.size, head * self.size)
        # One thread for a key and its value saves a second look at position and slot; plain copies
        # are faster apart.
        merged = rotary > 0 and dims == v_dims and heads_k == heads_v
        if merged:
            k_width = v_width = min(k_width, v_width)
        self.constants(MERGED=merged, VK=k_width, VV=v_width)

    def plane(self, part: str, view: PlaneView, name: str, unit: int, offset: int = 0) -> None:
        """The pool tensor of `part`, in format `name`; the strides of `view` are in units of `unit`
        bytes, and it begins `offset` bytes into its argument."""
        strides = dict.fromkeys(("page", "plane", "row", "row_group", "dim_group"), 0)
        if view.pages > 1:
            strides["page"] = view.page_stride
        if view.heads > 1:
            strides["plane"] = view.head_stride
        if view.page_size > 1 and view.row_group > 1:
            strides["row"] = view.row_stride
        if view.row_group < view.page_size:
            strides["row_group"] = view.row_group_stride
        grouped = view.dim_group < view.head_dim
        if grouped:
            strides["dim_group"] = view.dim_group_stride
        scalars = {f"{part}_{what}": stride * unit for what, stride in strides.items()}
        self.call.scalars.update(scalars, pool_slots=view.pages * view.page_size)
        self.call.formats[f"{part.upper()}Pool"] = name
        constants = {
            "ROW_GROUP": view.row_group,
            "GROUP": view.dim_group if grouped else 0,
            "POOL_ALIGN": power_of_2(self.align(f"{part}_pool"), offset, *scalars.values()),
            "POOL_OFFSET": offset,
        }
        self.constants(STORE=1, PAGE=view.page_size)
        self.constants(**{f"{part.upper()}_{what}": value for what, value in constants.items()})

    def norm_eps(self, eps: float) -> None:
        """`eps` as the bits of a float32."""
        self.call.scalars["norm_eps"] = int.from_bytes(struct.pack("<f", eps), "little")

    def slots(self, options: Options) -> None:
        key = self.call.key
        assert key.slot_dtype is not None
        self.call.formats["SlotInt"] = _INTEGERS[key.slot_dtype]
        # Negative slots are padding anyway.
        padding = -1 if options.padding_slot is None else options.padding_slot
        if 0 <= padding < 2**63:
            self.call.scalars["padding_slot"] = padding
            self.constants(HAS_PADDING=1)
        # An MLA row has one scale for both of its parts.
        v_scale = key.k_scale if key.latent_dim else key.v_scale
        self.constants(K_SCALE=_SCALES[key.k_scale], V_SCALE=_SCALES[v_scale])
        if key.window_map_dtype is not None:
            self.call.formats["WindowInt"] = _INTEGERS[key.window_map_dtype]
            self.call.scalars["window_size"] = self.tensors["window"].shape[0]
            self.constants(HAS_WINDOW=1)

    def rotation(self, options: Options) -> None:
        key, table = self.call.key, self.tensors["table"]
        positions = self.tensors["positions"]
        assert key.position_dtype is not None
        self.call.formats |= {
            "Table": _format(table),
            "PositionInt": _INTEGERS[key.position_dtype],
        }
        row = table.stride(0) if table.shape[0] > 1 else 0
        half = key.rotary_dim // 2
        size = table.element_size()
        aligned = power_of_2(self.align("table"), row * size, half * size)
        self.constants(TABLE_WIDTH=max(aligned // size, 1), INTERLEAVED=options.interleaved)
        self.call.scalars |= {"table_row": row, "max_position": table.shape[0]}
        if options.mrope_section is not None:
            self.call.scalars["position_stream"] = positions.stride(0)
            t, h, w = options.mrope_section
            self.constants(MROPE=2 if options.mrope_interleaved else 1)
            self.constants(SECTION_T=t, SECTION_H=h, SECTION_W=w)
        if key.offset_dtype is not None:
            self.call.formats["OffsetInt"] = _INTEGERS[key.offset_dtype]
            self.constants(HAS_OFFSETS=1)


def kv_planes(describer: Describer, options: Options) -> None:
    """The two pool tensors of the KV ops."""
    layout = options.layout
    assert layout is not None
    for part in ("k", "v"):
        pool = describer.tensors[f"{part}_pool"]
        view = plane_view(layout, part, pool.shape, pool.stride())
        describer.plane(part, view, _format(pool), pool.element_size())


def mla_planes(describer: Describer) -> None:
    """An MLA row: its rope part is the only key head, its latent part the value, which the
    656-byte row cuts into heads of one tile each."""
    key, pool = describer.call.key, describer.tensors["v_pool"]
    size = pool.element_size()
    *outer, _ = _strides(pool)
    page, row = outer if pool.dim() == 3 else (outer[0], 0)

    def view(heads: int, head: int, dims: int) -> PlaneView:
        pages, page_size = pool.shape[0], key.page_size
        # A page's rows are groups of one row each, as in the other layouts without row groups.
        return PlaneView(pages, page_size, heads, dims, 1, dims, page, head, row, 0, 0, 1)

    latent, rope = key.latent_dim, key.head_dim
    if key.row_format == "fp8_ds_mla":
        tiles = latent // TILE
        describer.keys_and_values(1, rope, key.rotary_dim, tiles, TILE, v_head=TILE)
        describer.plane("v", view(tiles, TILE, TILE), "E4m3", 1)
        describer.plane("k", view(1, 0, rope), "Bf16", 1, latent + 4 * tiles)
        describer.constants(TILES=1, MERGED=0)
        return
    describer.keys_and_values(1, rope, key.rotary_dim, 1, latent)
    describer.plane("v", view(1, 0, latent), _format(pool), size)
    describer.plane("k", view(1, 0, rope), _format(pool), size, latent * size)
    if key.rotary_dim == 0 and key.row_format == "model":
        parts = (latent * size, rope * size)
        rows = (describer.call.scalars[f"{part}_token"] * size for part in "kv")
        sources = (describer.align(part) for part in "kv")
        width = max(power_of_2(*parts, *rows, *sources, most=LONG_VECTOR_BYTES) // size, 1)
        to = power_of_2(describer.align("v_pool"), page * size, row * size, most=LONG_VECTOR_BYTES)
        describer.constants(JOINED=1, MERGED=0, VK=width, VV=width, V_POOL_ALIGN=to)
