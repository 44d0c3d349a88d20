"""The cases of the pairwise grids: every option of every op meets every other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ops.calls import FNUZ, FP8, Case
from ops.pairwise import pairwise

HEADS = [(9, 3), (32, 8), (1, 1), (8, 1), (5, 5), (12, 4)]
HEAD_DIMS = [64, 80, 96, 112, 128, 192, 256, 512, 576]
POOLS = ["model", *FP8]
SCALES = [None, "one", "tensor", "head"]

COMMON: dict[str, list[Any]] = {
    "dtype": ["float16", "bfloat16", "float32"],
    "tokens": [6, 1, 13],
    "slot_dtype": ["int64", "int32"],
    "padding_slot": [None, 0, 5, 10**6],
    "window": [None, "int32", "int64"],
    "pool_strides": ["dense", "kv", "odd", "random"],
    "mistakes": [True, False],
    "specials": [True, False],
}
ROTATION: dict[str, list[Any]] = {
    "interleaved": [False, True],
    "table_dtype": ["float32", "model"],
    "table_pad": [0, 3, 8],
    "position_dtype": ["int64", "int32"],
    "offset_dtype": [None, "int32", "int64"],
    "mrope": [None, "sectioned", "interleaved"],
}
KV: dict[str, list[Any]] = {
    "heads": HEADS,
    "head_dim": HEAD_DIMS,
    "v_dim": ["same", "half", "wider"],
    "layout": ["NHD", "HND", "slots", "x_packed", "shuffled"],
    "page": [16, 1, 6],
    "dim_group": [8, 4, 16],
    "pool_dtype": POOLS,
    "k_scale": SCALES,
    "v_scale": SCALES,
    "strides": ["dense", "packed", "odd", "heads_first", "random"],
}
ROTARY_PARTS: dict[str, list[Any]] = {"rotary": ["full", "half", "quarter", "two", "odd half"]}
Q_OUT: dict[str, list[Any]] = {
    "q_out": [None, "model", *FP8],
    "q_scale": SCALES,
    "write_k": [False, True],
}
NORMS: dict[str, list[Any]] = {
    "q_norm": [None, "float32", "model"],
    "k_norm": [None, "float32", "model"],
}
MLA: dict[str, list[Any]] = {
    "row_format": ["model", "fp8_e4m3fn", "fp8_e5m2", "fp8_ds_mla"],
    "latent_dim": [512, 128, 96, 13, 256],
    "rope_dim": [64, 32, 2, 10, 128],
    "heads": [(16, 1), (1, 1), (9, 1)],
    "k_scale": [None, "one", "tensor"],
    "strides": ["dense", "packed", "odd", "random"],
    "paged": [True, False],
    "page": [16, 1, 6],
}


def _rotary_dim(part: str, head_dim: int) -> int:
    whole = {"full": head_dim, "half": head_dim // 2, "quarter": head_dim // 4, "two": 2}
    return whole.get(
        part, head_dim // 2 + 6
    )  # "odd half": half of it is odd, no vector width divides it


def _kv_case(op: str, seed: int, drawn: dict[str, Any]) -> Case:
    heads, part, v_dim, page = (
        drawn.pop(name, None) for name in ("heads", "rotary", "v_dim", "page")
    )
    head_dim = drawn["head_dim"]
    fields = {**drawn, "op": op, "seed": seed, "heads_q": heads[0], "heads_kv": heads[1]}
    if part is not None:
        fields["rotary_dim"] = _rotary_dim(part, head_dim)
    if v_dim is not None:
        fields["v_head_dim"] = {"same": head_dim, "half": head_dim // 2, "wider": head_dim + 3}[
            v_dim
        ]
    if page is not None:
        # A shuffled page holds whole groups of rows.
        size = page * drawn["dim_group"] if drawn["layout"] == "shuffled" else page
        size = min(size, 48)
        rows = 1 if drawn["layout"] == "slots" else size
        fields |= {"page_size": size, "pages": math.ceil(15 / rows) + 1}
    if op == "rope_":
        fields["has_k"] = seed % 5 != 0
    return Case(**fields)


def _mla_case(op: str, seed: int, drawn: dict[str, Any]) -> Case:
    heads, rope, page = (drawn.pop(name) for name in ("heads", "rope_dim", "page"))
    row = drawn["row_format"]
    if row.startswith("fp8_e"):
        drawn |= {
            "row_format": "fp8",
            "pool_dtype": {"fp8_e4m3fn": FP8[0], "fp8_e5m2": FP8[1]}[row],
        }
    elif row == "fp8_ds_mla":
        rope, drawn["latent_dim"] = 64, 512
    fields = {**drawn, "op": op, "seed": seed, "heads_q": heads[0], "head_dim": rope}
    fields |= {"page_size": page, "pages": math.ceil(15 / (page if drawn["paged"] else 1)) + 1}
    return Case(**fields)


def rope_cases() -> list[Case]:
    fields = {"dtype", "tokens", "mistakes", "specials"}
    parameters = {name: values for name, values in COMMON.items() if name in fields}
    parameters |= (
        ROTATION | ROTARY_PARTS | {name: KV[name] for name in ("heads", "head_dim", "strides")}
    )
    return [_kv_case("rope_", i, drawn) for i, drawn in enumerate(pairwise(parameters))]


def rope_store_kv_cases() -> list[Case]:
    parameters = COMMON | ROTATION | ROTARY_PARTS | KV | Q_OUT | NORMS
    return [_kv_case("rope_store_kv_", i, drawn) for i, drawn in enumerate(pairwise(parameters))]


def store_kv_cases() -> list[Case]:
    return [_kv_case("store_kv_", i, drawn) for i, drawn in enumerate(pairwise(COMMON | KV))]


def store_mla_cases() -> list[Case]:
    return [_mla_case("store_mla_", i, drawn) for i, drawn in enumerate(pairwise(COMMON | MLA))]


def rope_store_mla_cases() -> list[Case]:
    parameters = COMMON | ROTATION | MLA | Q_OUT
    return [_mla_case("rope_store_mla_", i, drawn) for i, drawn in enumerate(pairwise(parameters))]


GRIDS = (rope_cases, rope_store_kv_cases, store_kv_cases, store_mla_cases, rope_store_mla_cases)


def half_of_all() -> list[Case]:
    """Every second case of each op, which is most values of every option."""
    return [case for cases in GRIDS for case in cases()[::2]]


def fnuz_cases() -> list[Case]:
    """Every second case that writes fp8, in the FNUZ encodings instead."""
    other = dict(zip(FP8, FNUZ, strict=True))
    found = []
    for case in (case for cases in GRIDS for case in cases()):
        pool = other.get(case.pool_dtype, case.pool_dtype)
        q_out = other.get(case.q_out or "", case.q_out)
        if (pool, q_out) != (case.pool_dtype, case.q_out) and case.row_format != "fp8_ds_mla":
            found.append(replace(case, pool_dtype=pool, q_out=q_out))
    return found[::2]
