"""How calls are cut into programs, by default and by a tuning table."""

from __future__ import annotations

from typing import Any

import pytest

from ropool.backends.triton import candidates
from ropool.backends.triton.plan import Plan, plan
from ropool.dispatch.key import Key

KEY = Key(
    op="rope_store_kv_", dtype="bfloat16", heads_q=9, heads_kv=3, head_dim=80, v_head_dim=80,
    rotary_dim=80,
)  # fmt: skip


def test_few_tokens_have_small_programs_and_many_have_large_ones() -> None:
    few, many = plan(KEY, 1, 32, 100), plan(KEY, 100_000, 32, 100)
    assert (few.warps, many.warps) == (4, 2)
    assert few.q.tokens == few.v.tokens == 1
    assert many.q.heads * many.q.tokens > few.q.heads


def test_what_is_many_follows_the_processors() -> None:
    assert plan(KEY, 1000, 32, 20).warps == 2
    assert plan(KEY, 1000, 32, 200).warps == 4


def test_an_mla_program_has_one_row_of_few_and_several_of_many() -> None:
    """The row is cut into its latent and its rope part, both powers of two."""
    key = Key(op="store_mla_", dtype="bfloat16", head_dim=64, latent_dim=512)
    few, many = plan(key, 1, 32, 132), plan(key, 65536, 32, 132)
    assert (few.v, few.k) == ((1, 1), (1, 1))
    assert (many.v, many.k) == ((4, 1), (32, 1))
    assert many.v.tokens * 512 == many.k.tokens * 64


def test_a_choice_goes_first() -> None:
    cut = plan(KEY, 1, 64, 100, {"warps": 1, "vectors": 2})
    # 128 vectors: 8 heads of 16 (80 dims as 128 of bfloat16); a block is a power of two.
    assert cut == Plan((1, 8), (1, 4), (1, 4), 1)


@pytest.mark.parametrize("tokens", [1, 500])
def test_every_candidate_is_a_choice(tokens: int) -> None:
    for choice in candidates.layouts(KEY, tokens):
        cut = plan(KEY, tokens, 32, 100, choice)
        for size in (*cut.q, *cut.k, *cut.v):
            assert size > 0
            assert size & (size - 1) == 0


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"warps": 3, "vectors": 1}, "has warps 3; allowed: 1, 2, 4, 8, 16"),
        ({"warps": 2}, "has vectors None; allowed"),
        ({"warps": 2, "vectors": "4"}, "has vectors '4'; allowed"),
    ],
)
def test_a_choice_that_is_none(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(KEY, 1, 32, 100, choice)
