"""Which workloads a request means, and how many bytes each must move."""

from __future__ import annotations

import pytest

from ropool.bench.traffic import min_bytes
from ropool.bench.workload import Workload, workloads
from ropool.errors import RopoolError


def one(
    op: str,
    heads: str,
    dtype: str = "bfloat16",
    kv: str = "auto",
    tokens: int = 1,
    **options: list[str],
) -> Workload:
    [workload] = workloads([op], [heads], [dtype], [kv], [tokens], **options)
    return workload


# Written out by hand: the factors are heads, dims, bytes, and how often each is moved.
@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        # Q 32*128*2 twice, K and V 8*128*2 each read and written, a table row 128*4, two indices.
        (one("rope_store_kv_", "32x8x128"), 16384 + 8192 + 512 + 16),
        (one("rope_store_kv_", "32x8x128", tokens=4096), 4096 * 25104),
        (one("rope_store_kv_", "9x3x64", "float32", tokens=16), 16 * (4608 + 3072 + 256 + 16)),
        # The pool's bytes halve; two scales of 4 bytes a call.
        (
            one("rope_store_kv_", "32x8x128", kv="fp8_e4m3", tokens=2),
            2 * (16384 + 4096 + 2048 + 512 + 16) + 8,
        ),
        # No slots, no pool; K read and written in place.
        (one("rope_", "32x8x128"), 16384 + 4096 + 512 + 8),
        (one("store_kv_", "32x8x128"), 8192 + 8),
        (one("store_kv_", "32x8x128", kv="fp8_e5m2"), 4096 + 2048 + 8 + 8),
        # Rows of 576 elements.
        (one("store_mla_", "128x512+64"), 2 * 1152 + 8),
        (one("store_mla_", "128x512+64", "float32", "fp8_ds_mla"), 2304 + 656 + 8),
        (one("store_mla_", "128x512+64", kv="fp8_e4m3", tokens=3), 3 * (1152 + 576 + 8) + 4),
        (one("rope_store_mla_", "128x512+64"), 2 * 16384 + 2304 + 256 + 16),
        (one("rope_store_mla_", "16x512+64", kv="fp8_ds_mla"), 4096 + 1152 + 656 + 256 + 16),
        # Two rows of norm weights a call.
        (one("rope_store_kv_", "32x8x128", norms=["on"]), 16384 + 8192 + 512 + 16 + 512),
        # The query leaves as one byte an element; its scale is the third.
        (
            one("rope_store_kv_", "32x8x128", kv="fp8_e4m3", q_dtypes=["fp8_e4m3"]),
            8192 + 4096 + 4096 + 2048 + 512 + 16 + 12,
        ),
    ],
    ids=lambda value: value.describe() if isinstance(value, Workload) else "",
)
def test_min_bytes(workload: Workload, expected: int) -> None:
    assert min_bytes(workload) == expected


def test_defaults_cover_every_op_and_each_workload_once() -> None:
    found = workloads()
    assert len(found) == len(set(found))
    assert {w.op for w in found} == {
        "rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_",
    }  # fmt: skip
    assert {w.tokens for w in found} == {1, 16, 256, 4096}
    fused = {(w.heads, w.dtype) for w in found if w.op == "rope_store_kv_"}
    assert fused == {(h, d) for h in ("32x8x128", "9x3x64") for d in ("bfloat16", "float32")}


def test_an_op_without_a_pool_or_queries_does_not_repeat_for_them() -> None:
    assert len(workloads(["rope_"], ["9x3x64"], ["float32"], ["auto", "fp8_e4m3"], [1])) == 1
    assert len(workloads(["store_mla_"], [], ["float32"], [], [1])) == 1


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"ops": ["rope"]}, "op 'rope' is unknown; known: rope_, "),
        ({"dtypes": ["bf16"]}, "dtype 'bf16' is unknown; known: bfloat16"),
        ({"kv_dtypes": ["fp8"]}, "KV dtype 'fp8' is unknown; known: auto, fp8_e4m3"),
        ({"heads": ["9x2x64"]}, "heads are '9x2x64'"),
        ({"heads": ["0x1x64"]}, "heads are '0x1x64'"),
        ({"heads": ["4x1x63"]}, "heads are '4x1x63'"),
        ({"heads": ["32,8"]}, "heads are '32,8'"),
        ({"heads": ["16x512+63"]}, "heads are '16x512+63'"),
        ({"tokens": [0]}, "tokens is 0"),
        ({"ops": ["store_mla_"], "heads": ["9x3x64"]}, "store_mla_ goes with nothing"),
        ({"ops": ["rope_"], "heads": ["16x512+64"]}, "rope_ goes with nothing"),
        ({"ops": ["store_kv_"], "kv_dtypes": ["fp8_ds_mla"]}, "store_kv_ goes with nothing"),
        ({"ops": ["rope_"], "norms": ["on"]}, "rope_ goes with nothing"),
        ({"ops": ["store_kv_"], "q_dtypes": ["fp8_e4m3"]}, "store_kv_ goes with nothing"),
        ({"norms": ["yes"]}, "norm 'yes' is unknown; known: off, on"),
        ({"q_dtypes": ["int8"]}, "query dtype 'int8' is unknown"),
    ],
)
def test_what_is_unknown_or_means_nothing_is_refused(request_: dict[str, list], words: str) -> None:
    with pytest.raises(RopoolError) as refused:
        workloads(**request_)
    assert words in str(refused.value)
