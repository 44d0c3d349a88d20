"""RotaryEmbedding: for which lengths its table is right, and when it becomes another."""

from __future__ import annotations

import gc

import pytest
import torch

from ropool.dispatch import OPS
from ropool.dispatch.settings import override
from ropool.rotary import (
    DynamicNTKScaling,
    LongRopeScaling,
    RotaryConfig,
    RotaryEmbedding,
    Scaling,
    StackedRotary,
    cos_sin_cache,
    embedding,
    inv_freq,
)
from rotary.hf_oracle import llama, modeling


def config(scaling: Scaling | None = None, max_position: int | None = 64) -> RotaryConfig:
    return RotaryConfig(
        head_dim=16, rotary_dim=8, theta=10000.0, scaling=scaling, max_position=max_position
    )


LONGROPE = LongRopeScaling(
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(2.0, 3.0, 4.0, 5.0),
    original_max_position=16,
    factor=4.0,
)
DYNAMIC = DynamicNTKScaling(factor=2.0, original_max_position=16)


def test_a_table_of_any_length_grows() -> None:
    rope = RotaryEmbedding(config())
    first = rope.cos_sin_cache
    before = first.clone()
    assert rope.lengths == (1, 64)
    assert not rope.prepare(64)
    assert rope.cos_sin_cache is first
    assert rope.prepare(65)
    assert rope.lengths == (1, 128)
    assert torch.equal(rope.cos_sin_cache[:64], before)
    assert torch.equal(first, before), "the table handed out has changed"
    assert rope.prepare(1000)
    assert rope.lengths == (1, 1000)
    assert not rope.prepare(1)
    assert torch.equal(rope.cos_sin_cache, cos_sin_cache(config(), 1000))


def test_a_shorter_table_on_request() -> None:
    rope = RotaryEmbedding(config(), 10, dtype=torch.bfloat16)
    assert rope.lengths == (1, 10)
    assert rope.cos_sin_cache.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="seq_len is None; allowed: an integer above 0"):
        RotaryEmbedding(config(max_position=None))
    with pytest.raises(ValueError, match="seq_len is 0; allowed: an integer of at least 1"):
        rope.prepare(0)


def test_longrope_switches_between_two_tables() -> None:
    rope = RotaryEmbedding(config(LONGROPE))
    long = rope.cos_sin_cache
    assert rope.lengths == (17, 64)
    assert torch.equal(long, cos_sin_cache(config(LONGROPE), 64))

    assert rope.prepare(3)
    short = rope.cos_sin_cache
    # A row beyond the original context would turn by short factors where long ones are due.
    assert rope.lengths == (1, 16)
    assert torch.equal(short, cos_sin_cache(config(LONGROPE), 16))
    assert not torch.equal(short, long[:16])

    assert not rope.prepare(16)
    assert rope.prepare(17)
    assert rope.cos_sin_cache is long
    assert rope.prepare(16)
    assert rope.cos_sin_cache is short


def test_dynamic_ntk_follows_the_length() -> None:
    rope = RotaryEmbedding(config(DYNAMIC), 5)
    short = rope.cos_sin_cache
    assert rope.lengths == (1, 16)
    assert not rope.prepare(16)
    for length in (17, 18, 40):
        assert rope.prepare(length)
        assert rope.lengths == (length, length)
        assert torch.equal(rope.cos_sin_cache, cos_sin_cache(config(DYNAMIC), length))
        assert not rope.prepare(length)
    assert rope.prepare(4)
    assert torch.equal(rope.cos_sin_cache, short)
    # Generation meets a new length with every token: tables do not pile up.
    assert len(rope._tables) == 2


def test_dynamic_ntk_as_their_module_does_it() -> None:
    theirs = llama(rope_type="dynamic", factor=2.0)
    module = modeling("llama").LlamaRotaryEmbedding(theirs)
    rope = RotaryEmbedding(RotaryConfig.from_hf(theirs), 10)
    for length in (100, 4096, 4097, 9000, 50):
        rope.prepare(length)
        module(torch.empty(1), torch.arange(length)[None])
        expected = inv_freq(rope.config, length)
        torch.testing.assert_close(module.inv_freq.double(), expected, rtol=2e-6, atol=0)
        first, last = rope.lengths
        assert first <= length <= last


def test_a_stack_holds_the_tables_of_all_lengths() -> None:
    rope = StackedRotary(config(LONGROPE), 64)
    assert rope.switch == 16
    assert [rope.offset(length) for length in (1, 16, 17, 64)] == [0, 0, 16, 16]
    assert torch.equal(rope.cos_sin_cache[:16], cos_sin_cache(config(LONGROPE), 16))
    assert torch.equal(rope.cos_sin_cache[16:], cos_sin_cache(config(LONGROPE), 64))
    for settings, rows in ((LONGROPE, 16), (DYNAMIC, 16), (None, 64)):
        one = StackedRotary(config(settings), rows, dtype=torch.bfloat16)
        assert one.switch is None and one.offset(rows) == 0
        assert torch.equal(one.cos_sin_cache, cos_sin_cache(config(settings), rows, torch.bfloat16))
    with pytest.raises(ValueError, match="max_position is 17; allowed: at most 16, since every"):
        StackedRotary(config(DYNAMIC), 17)


def test_options_are_the_keyword_arguments_of_the_ops() -> None:
    plain = RotaryEmbedding(config())
    assert plain.options == {
        "interleaved": False,
        "mrope_section": None,
        "mrope_interleaved": False,
    }
    mrope = RotaryConfig(
        head_dim=16,
        rotary_dim=16,
        theta=1e4,
        interleaved=True,
        mrope_section=(4, 2, 2),
        mrope_interleaved=True,
    )
    assert RotaryEmbedding(mrope, 4).options == {
        "interleaved": True,
        "mrope_section": (4, 2, 2),
        "mrope_interleaved": True,
    }


class Step:
    pass


@pytest.mark.parametrize(
    "ops", [(), *((op,) for op in OPS), ("rope_", "store_kv_"), ("rope_", "store_mla_")]
)
def test_a_step_is_rotated_and_stored_once(ops: tuple[str, ...]) -> None:
    """Every op that may come next is taken, every other refused, for that layer and step alone."""
    allowed = {(): OPS, ("rope_",): ("store_kv_", "store_mla_")}.get(ops, ())
    rope, other = RotaryEmbedding(config()), RotaryEmbedding(config())
    for op in OPS:
        step, another = Step(), Step()
        with override(check=True):
            for before in ops:
                rope.claim(step, 1, before)
            if op in allowed:
                other.claim(step, 1, op)
            else:
                said = f"layer 1 has called {ops[-1]} on its K in this step, and now {op}; allowed"
                with pytest.raises(RuntimeError, match=said):
                    other.claim(step, 1, op)
            rope.claim(step, 2, op)
            rope.claim(another, 1, op)


def test_an_op_that_is_none_cannot_be_claimed() -> None:
    with override(check=True), pytest.raises(ValueError, match="op is 'rope'; known: rope_, "):
        RotaryEmbedding.claim(Step(), 0, "rope")


def test_claims_cost_nothing_without_checks_and_end_with_their_step() -> None:
    with override(check=False):
        for _ in range(2):
            RotaryEmbedding.claim(None, 0, "rope_store_kv_")
        assert len(embedding._claims) == 0
    step = Step()
    with override(check=True):
        RotaryEmbedding.claim(step, 0, "rope_")
        assert len(embedding._claims) == 1
    del step
    gc.collect()
    assert len(embedding._claims) == 0
