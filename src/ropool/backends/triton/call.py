"""From a call of an op to the parameters of the kernel: which tensor is which, strides, and what
the compiler is told as constants. Reads shapes and strides, never data or addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ropool.backends.triton.plan import Plan, next_power_of_2
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.layouts import KVLayout, PlaneView, plane_view

TENSORS: dict[str, tuple[str, ...]] = {
    "rope_": ("q", "k", "table", "positions", "offsets"),
    "rope_store_kv_": (
        "q", "k", "v", "k_pool", "v_pool", "table", "positions", "slot_mapping", "offsets",
        "q_weight", "k_weight", "k_scale", "v_scale", "q_out", "q_scale", "window_map",
    ),
    "store_kv_": (
        "k", "v", "k_pool", "v_pool", "slot_mapping", "k_scale", "v_scale", "window_map",
    ),
    "store_mla_": ("v", "k", "pool", "slot_mapping", "scale", "window_map"),
    "rope_store_mla_": (
        "q", "v", "k", "pool", "table", "positions", "slot_mapping", "offsets", "scale", "q_out",
        "q_scale", "window_map",
    ),
}  # fmt: skip
"""What the kernel calls the tensors of an op, in the op's order. An MLA row is one value head, the
latent, and one key head, the rope part, of one pool with one scale."""

_SHARED = {"k_pool": "pool", "v_pool": "pool", "k_scale": "scale", "v_scale": "scale"}
_PACKED_ROPE_BYTE = 528
"""Where the rope part of a 656-byte row starts."""


@dataclass(frozen=True)
class Call:
    """The kernel's parameters for one launch. `sources` maps each tensor parameter to the place of
    its tensor among the op's arguments."""

    sources: dict[str, int]
    numbers: dict[str, int | float]
    constants: dict[str, Any]
    grid: int
    warps: int


def describe(key: Key, args: Args, options: Options, plan: Plan, native: bool, fp8: bool) -> Call:
    """The parameters for a call that is cut as `plan` says. `native` and `fp8`: the target rounds
    to bfloat16 and to the OCP fp8 formats by itself."""
    places = {name: i for i, name in enumerate(TENSORS[key.op]) if args[i] is not None}
    sources = {
        **{name: place for name, place in places.items() if name not in ("pool", "scale")},
        **{name: places[whole] for name, whole in _SHARED.items() if whole in places},
    }
    tensors: dict[str, Tensor] = {name: args[i] for name, i in sources.items()}
    mla = "pool" in places
    heads_kv = 1 if mla or "k" not in tensors else key.heads_kv
    tokens = next(iter(tensors.values())).shape[0]
    half = key.rotary_dim // 2
    v_head_dim = key.latent_dim if mla else key.v_head_dim
    if mla:
        k_view = v_view = _mla_view(tensors["k_pool"])
    elif "k_pool" in tensors:
        k_view = _view(tensors, "k", options.layout)
        v_view = _view(tensors, "v", options.layout)
    else:
        k_view = v_view = _NO_VIEW
    sections = key.mrope_section or (0, 0, 0)
    packed = key.row_format == "fp8_ds_mla"
    pool_format = key.pool_dtype or key.dtype
    blocks = {
        "q": (plan.q, key.heads_q if "q" in tensors else 0),
        "k": (plan.k, heads_kv if "k" in tensors else 0),
        "v": (plan.v, heads_kv if "v" in tensors else 0),
    }
    group = max((block.tokens for block, heads in blocks.values() if heads), default=1)
    programs = 0

    numbers: dict[str, int | float] = {
        "tokens": tokens,
        "max_position": tensors["table"].shape[0] if "table" in tensors else 0,
        "pool_slots": k_view.pages * k_view.page_size,
        "window_size": tensors["window_map"].shape[0] if "window_map" in tensors else 0,
        "padding_slot": _padding(options) or 0,
        "norm_eps": float(options.norm_eps),
        "table_row": tensors["table"].stride(0) if "table" in tensors else 0,
        "position_row": tensors["positions"].stride(0) if key.mrope_section else 0,
    }
    for name, short in (("q", "q"), ("k", "k"), ("v", "v"), ("q_out", "out")):
        # The parts of an MLA row, `[T, L]` and `[T, R]`, have one head and no stride for it.
        strides = tensors[name].stride()[:-1] if name in tensors else ()
        numbers[f"{short}_token"], numbers[f"{short}_head"] = (*strides, 0, 0)[:2]
    for short, view in (("k", k_view), ("v", v_view)):
        numbers[f"{short}_page"] = view.page_stride
        numbers[f"{short}_plane_head"] = view.head_stride
        numbers[f"{short}_row_group"] = view.row_group_stride
        numbers[f"{short}_row"] = view.row_stride
        numbers[f"{short}_dim_group"] = view.dim_group_stride

    constants: dict[str, Any] = {
        "HEADS_Q": key.heads_q,
        "HEADS_KV": heads_kv,
        "HEAD_DIM": key.head_dim,
        "V_HEAD_DIM": v_head_dim,
        "HALF": half,
        "HALF_BLOCK": next_power_of_2(half),
        "REST_BLOCK": next_power_of_2(key.head_dim - 2 * half) if key.head_dim > 2 * half else 0,
        "HEAD_BLOCK": next_power_of_2(key.head_dim),
        "V_BLOCK": next_power_of_2(v_head_dim),
        "INTERLEAVED": key.interleaved,
        "STREAMS": 3 if key.mrope_section else 1,
        "MROPE_T": sections[0],
        "MROPE_H": sections[1],
        "MROPE_W": sections[2],
        "MROPE_INTERLEAVED": key.mrope_interleaved,
        "Q_FORMAT": key.q_out_dtype or key.dtype,
        "K_FORMAT": key.dtype,
        "POOL_FORMAT_K": "bfloat16_bytes" if packed else pool_format,
        "POOL_FORMAT_V": "fp8_ds_mla" if packed else pool_format,
        "Q_SCALE": key.q_scale,
        "K_SCALE": key.k_scale,
        "V_SCALE": key.k_scale if mla else key.v_scale,
        "WRITE_K": key.write_k or key.op == "rope_",
        "HAS_PADDING_SLOT": _padding(options) is not None,
        "PAGE_SIZE": max(k_view.page_size, 1),
        "K_ROW_GROUP": k_view.row_group,
        "V_ROW_GROUP": v_view.row_group,
        "K_DIM_GROUP": k_view.dim_group,
        "V_DIM_GROUP": v_view.dim_group,
        "K_FIRST": _PACKED_ROPE_BYTE if packed else key.latent_dim,
        "NATIVE": native,
        "NATIVE_FP8": fp8,
        "GROUP_TOKENS": group,
    }
    for short, (block, heads) in blocks.items():
        roles = -(-heads // block.heads)
        programs += roles * (group // block.tokens)
        constants[f"{short.upper()}_TOKENS"] = block.tokens
        constants[f"{short.upper()}_HEADS"] = block.heads
        constants[f"{short.upper()}_ROLES"] = roles
    grid = -(-tokens // group) * programs
    return Call(sources, numbers, constants, grid, plan.warps)


_NO_VIEW = PlaneView(0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0)


def _padding(options: Options) -> int | None:
    """The padding slot, if there is one that a slot mapping could hold."""
    slot = options.padding_slot
    return None if slot is None or not 0 <= slot < 2**63 else slot


def _view(tensors: dict[str, Tensor], part: str, layout: KVLayout | None) -> PlaneView:
    assert layout is not None
    pool = tensors[f"{part}_pool"]
    return plane_view(layout, part, pool.shape, pool.stride())


def _mla_view(pool: Tensor) -> PlaneView:
    """Rows of an MLA pool as heads of a pool with one head."""
    if pool.dim() == 2:
        return plane_view(KVLayout.SLOTS, "k", pool[:, None].shape, pool[:, None].stride())
    return plane_view(KVLayout.NHD, "k", pool[:, :, None].shape, pool[:, :, None].stride())
