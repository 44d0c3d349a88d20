"""Whole calls drawn by hypothesis: shapes, strides, dtypes, options and mistakes at once."""

from __future__ import annotations

import math
import os

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from ops.backend import Backend
from ops.calls import FP8, Case, check

OPS = ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"]
INDEX = st.sampled_from(["int32", "int64"])
CASES = int(os.environ.get("ROPOOL_RANDOM_CASES", "120"))
"""Calls of each op on each backend."""
PART = 200
"""Calls of one test, so that many calls can be drawn on many cores."""
SCALE = st.sampled_from([None, "one", "tensor", "head"])


@st.composite
def cases(draw: st.DrawFn, op: str) -> Case:
    """A legal call of `op`, in any of its variants."""
    layout = draw(st.sampled_from(["NHD", "HND", "slots", "x_packed", "shuffled"]))
    group = draw(st.sampled_from([1, 2, 4, 8, 16]))
    packed = layout in ("x_packed", "shuffled")
    head_dim = draw(st.integers(1, 12)) * group if packed else draw(st.integers(2, 140))
    head_dim = max(head_dim, 2)
    heads_kv = draw(st.integers(1, 5))
    tokens = draw(st.integers(0, 12))
    page = draw(st.integers(1, 3)) * group if layout == "shuffled" else draw(st.integers(1, 17))
    paged = draw(st.booleans())
    rows = 1 if layout == "slots" or not paged else page
    mla = "mla" in op
    row_format = draw(st.sampled_from(["model", "fp8", "fp8_ds_mla"])) if mla else "model"
    latent = 512 if row_format == "fp8_ds_mla" else draw(st.integers(1, 520))
    if row_format == "fp8_ds_mla":
        head_dim = 64
    elif mla:
        head_dim = head_dim // 2 * 2
    fp8 = st.sampled_from(FP8)
    return Case(
        op=op,
        seed=draw(st.integers(0, 2**16)),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        tokens=tokens,
        heads_q=heads_kv * draw(st.integers(1, 4)),
        heads_kv=heads_kv,
        head_dim=head_dim,
        v_head_dim=draw(st.none() | st.integers(1, 80)),
        has_k=draw(st.booleans()),
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)) if not mla else head_dim,
        interleaved=draw(st.booleans()),
        table_dtype=draw(st.sampled_from(["float32", "model"])),
        table_pad=draw(st.integers(0, 5)),
        max_position=draw(st.integers(1, 40)),
        position_dtype=draw(INDEX),
        slot_dtype=draw(INDEX),
        offset_dtype=draw(st.none() | INDEX),
        mrope=draw(st.sampled_from([None, "sectioned", "interleaved"])),
        q_norm=draw(st.sampled_from([None, "float32", "model"])),
        k_norm=draw(st.sampled_from([None, "float32", "model"])),
        layout=layout,
        pages=math.ceil(max(tokens, 1) / rows) + draw(st.integers(0, 2)),
        page_size=page,
        dim_group=group,
        pool_dtype=draw(fp8) if row_format == "fp8" else draw(st.just("model") | fp8),
        k_scale=draw(st.sampled_from([None, "one", "tensor"]) if mla else SCALE),
        v_scale=draw(SCALE),
        q_out=draw(st.sampled_from([None, "model", *FP8])),
        q_scale=draw(SCALE),
        write_k=draw(st.booleans()),
        padding_slot=draw(st.none() | st.integers(-3, 20)),
        window=draw(st.none() | INDEX),
        latent_dim=latent,
        row_format=row_format,
        paged=paged,
        strides=draw(st.sampled_from(["dense", "packed", "odd", "heads_first", "random"])),
        pool_strides=draw(st.sampled_from(["dense", "kv", "odd", "random"])),
        mistakes=draw(st.booleans()),
        specials=draw(st.booleans()),
    )


@pytest.mark.parametrize("part", range(math.ceil(CASES / PART)))
@pytest.mark.parametrize("op", OPS)
@settings(
    max_examples=min(CASES, PART), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_call(data: st.DataObject, op: str, part: int, backend: Backend) -> None:
    check(data.draw(cases(op)), backend)
