"""What a call is specialised to: widths from sizes, strides and addresses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cuda_backend.specialisations import bound, source
from ops.calls import Case, arguments
from ropool.backends.cuda.launch import describe


def constants(case: Case, align: int = 16, **changes: Any) -> dict[str, int]:
    call = bound(case.op, arguments(case) | changes)
    return describe(*call, lambda name: align).integers


BASE = Case(tokens=8, head_dim=128)


@pytest.mark.parametrize(
    ("change", "widths"),
    [
        ({}, (8, 8, 8)),
        ({"dtype": "float32"}, (4, 4, 4)),
        ({"rotary_dim": 24}, (4, 4, 4)),
        ({"rotary_dim": 10}, (1, 1, 1)),
        ({"head_dim": 80, "rotary_dim": 32}, (8, 8, 8)),
        ({"v_head_dim": 36}, (8, 8, 4)),
        ({"strides": "odd"}, (1, 1, 1)),
    ],
)
def test_vector_widths(change: dict[str, Any], widths: tuple[int, int, int]) -> None:
    found = constants(replace(BASE, **change))
    assert (found["VQ"], found["VK"], found["VV"]) == widths


@pytest.mark.parametrize(("align", "width"), [(16, 8), (8, 4), (2, 1)])
def test_addresses_narrow_the_vectors(align: int, width: int) -> None:
    found = constants(BASE, align)
    assert (found["VQ"], found["K_POOL_ALIGN"]) == (width, align)


@pytest.mark.parametrize(("align", "width"), [(32, 16), (16, 8), (4, 2), (1, 1)])
@pytest.mark.parametrize("latent", [512, 64])
def test_mla_rows_that_are_stored_as_they_came_take_the_longest_vectors(
    align: int, width: int, latent: int
) -> None:
    mla = Case(op="store_mla_", tokens=8, head_dim=64, latent_dim=latent)
    found = constants(mla, align)
    assert (found["VK"], found["VV"], found["V_POOL_ALIGN"]) == (width, width, align)
    odd = constants(replace(mla, latent_dim=24), align)
    assert odd["VV"] == min(width, 8)  # the rope part begins 48 bytes into a row


def test_a_dimension_of_one_element_has_no_stride_that_matters() -> None:
    q = torch.zeros(1, 4, 128, dtype=torch.bfloat16).as_strided((1, 4, 128), (7, 128, 1))
    assert constants(replace(BASE, tokens=1), q=q)["VQ"] == 8


FP8 = {"pool_dtype": "float8_e4m3fn"}
FIELDS: dict[str, dict[Any, dict[str, Any]]] = {
    "dtype": {"float16": {}, "bfloat16": {}, "float32": {}},
    "heads_q": {4: {}, 6: {}},
    "heads_kv": {2: {}, 4: {}},
    "head_dim": {64: {}, 128: {}},
    "v_head_dim": {64: {}, 32: {}},
    "rotary_dim": {64: {}, 32: {}},
    "interleaved": {False: {}, True: {}},
    "table_dtype": {"float32": {}, "model": {}},
    "position_dtype": {"int64": {}, "int32": {}},
    "slot_dtype": {"int64": {}, "int32": {}},
    "offset_dtype": {None: {}, "int32": {}, "int64": {}},
    "mrope": {None: {}, "sectioned": {}, "interleaved": {}},
    "q_norm": {None: {}, "float32": {}, "model": {}},
    "k_norm": {None: {}, "float32": {}, "model": {}},
    "layout": {"NHD": {}, "x_packed": {}, "shuffled": {"page_size": 16}},
    "page_size": {4: {}, 8: {}},
    "pool_dtype": {"model": {}, "float8_e4m3fn": {}, "float8_e5m2": {}},
    "k_scale": {None: FP8, "tensor": FP8, "head": FP8},
    "v_scale": {None: FP8, "tensor": FP8, "head": FP8},
    "q_out": {None: {}, "model": {}, "float8_e4m3fn": {}},
    "write_k": {False: {}, True: {}},
    "window": {None: {}, "int32": {}, "int64": {}},
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_static_field_is_in_the_source(field: str) -> None:
    """Two calls that need different kernels must not share a cache entry."""
    sources = set()
    for value in FIELDS[field]:
        case = replace(Case(), **({field: value} | FIELDS[field][value]))
        sources.add(source(bound(case.op, arguments(case)), "sm_90"))
    assert len(sources) == len(FIELDS[field])


def test_the_number_of_tokens_is_not_in_the_source() -> None:
    few = [
        source(bound("store_kv_", arguments(Case(op="store_kv_", tokens=t))), "sm_90")
        for t in (3, 4)
    ]
    assert few[0] == few[1]
