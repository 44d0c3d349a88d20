"""Frequencies of every variant against transformers' own functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropool.rotary import (
    LongRopeScaling,
    RotaryConfig,
    attention_factor,
    cos_sin_cache,
    inv_freq,
    length_range,
)
from rotary.hf_oracle import Case, cases, frequencies, in_float64, llama, rotary_class


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_frequencies_are_those_of_transformers(case: Case) -> None:
    config = RotaryConfig.from_hf(case.config, case.layer_type)
    actual = inv_freq(config, case.seq_len)
    assert actual.dtype == torch.float64
    assert actual.shape == (config.rotary_dim // 2,)

    single, factor = frequencies(case)
    assert single.dtype == torch.float32
    # Their float32 power is itself 1e-6 off where the exponent is no dyadic fraction.
    assert_close(actual, single, 2e-6)
    with in_float64():
        double, _ = frequencies(case)
    assert double.dtype == torch.float64
    assert_close(actual, double, 1e-13)
    assert attention_factor(config, case.seq_len) == pytest.approx(factor, rel=1e-14)


def test_attention_factors_are_not_all_one() -> None:
    # The comparison above would not see a factor that is dropped on both sides.
    factors = {
        str(case): attention_factor(RotaryConfig.from_hf(case.config, case.layer_type))
        for case in cases()
    }
    assert factors["yarn"] == pytest.approx(0.1 * math.log(4) + 1)
    assert factors["yarn-factor"] == 0.7
    expected = (0.1 * math.log(40) + 1) / (0.06 * math.log(40) + 1)
    assert factors["yarn-deepseek"] == pytest.approx(expected)
    assert factors["longrope-short"] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_small_positions_equal_their_module(case: Case) -> None:
    config = RotaryConfig.from_hf(case.config, case.layer_type)
    module = rotary_class(case)(case.config)
    positions = torch.arange(16)
    last = case.seq_len or 0
    if last:  # Their module takes the length from the greatest position.
        positions = torch.cat((positions, torch.tensor([last - 1])))
    keywords = {} if case.layer_type is None else {"layer_type": case.layer_type}
    cos, sin = module(torch.empty(1, dtype=torch.float32), positions[None], **keywords)
    table = cos_sin_cache(config, max(last, 16))
    half = config.rotary_dim // 2
    # gpt_oss keeps one half, the others two copies of it.
    # Their float32 angles are off by 16 * 2^-22, so this holds at small positions only.
    tolerance = {"rtol": 1e-6, "atol": 8e-6}
    torch.testing.assert_close(table[:16, :half], cos[0, :16, :half], **tolerance)
    torch.testing.assert_close(table[:16, half:], sin[0, :16, :half], **tolerance)


POSITIVE = st.floats(1.0, 64.0)


@st.composite
def rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    head_dim = 2 * draw(st.integers(2, 96))
    rope: dict[str, Any] = {"head_dim": head_dim, "rope_theta": draw(st.floats(100.0, 1e8))}
    rope["rope_type"] = draw(
        st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope"])
    )
    original = draw(st.integers(64, 65536))
    factors = st.lists(POSITIVE, min_size=head_dim // 2, max_size=head_dim // 2)
    if rope["rope_type"] in ("linear", "dynamic", "yarn", "llama3"):
        rope["factor"] = draw(POSITIVE)
    if rope["rope_type"] in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = original
    if rope["rope_type"] == "yarn":
        rope["beta_slow"] = draw(st.floats(0.5, 4.0))
        rope["beta_fast"] = rope["beta_slow"] + draw(st.floats(0.5, 60.0))
        rope["truncate"] = draw(st.booleans())
        rope["mscale"] = draw(st.sampled_from([None, 0.0, 0.707, 1.0]))
        rope["mscale_all_dim"] = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
        rope["attention_factor"] = draw(st.sampled_from([None, 0.5, 1.3]))
    if rope["rope_type"] == "llama3":
        rope["low_freq_factor"] = draw(st.floats(0.5, 4.0))
        rope["high_freq_factor"] = rope["low_freq_factor"] + draw(st.floats(0.1, 60.0))
    if rope["rope_type"] == "longrope":
        rope["short_factor"], rope["long_factor"] = draw(factors), draw(factors)
        rope["factor"] = draw(st.one_of(st.none(), POSITIVE))
    return rope


@settings(max_examples=150)
@given(rope_parameters(), st.integers(1, 200_000))
def test_any_parameters(rope: dict[str, Any], seq_len: int) -> None:
    config = llama(**rope)
    case = Case("random", config, "llama.LlamaRotaryEmbedding", seq_len=seq_len)
    with in_float64():
        expected, factor = frequencies(case)
    read = RotaryConfig.from_hf(config)
    assert_close(inv_freq(read, seq_len), expected, 1e-11)
    assert attention_factor(read, seq_len) == pytest.approx(factor, rel=1e-12)


def test_longrope_attention_factors_by_length() -> None:
    config = RotaryConfig(
        head_dim=8,
        rotary_dim=8,
        theta=10000.0,
        scaling=LongRopeScaling(
            short_factor=(1.0,) * 4,
            long_factor=(2.0,) * 4,
            original_max_position=10,
            factor=4.0,
            short_attention_factor=1.25,
            long_attention_factor=1.5,
        ),
    )
    assert attention_factor(config, 10) == 1.25
    assert attention_factor(config, 11) == 1.5
    assert cos_sin_cache(config, 10)[0, 0] == 1.25
    assert cos_sin_cache(config, 11)[0, 0] == 1.5


def test_length_range() -> None:
    def of(name: str) -> RotaryConfig:
        return next(RotaryConfig.from_hf(c.config) for c in cases() if str(c) == name)

    assert length_range(of("default"), 7) == (1, None)
    assert length_range(of("longrope-long"), 4096) == (1, 4096)
    assert length_range(of("longrope-long"), 4097) == (4097, None)
    assert length_range(of("dynamic-long"), 4096) == (1, 4096)
    assert length_range(of("dynamic-long"), 5000) == (5000, 5000)


@pytest.mark.parametrize("seq_len", [0, -1, 2.5, True])
def test_bad_length(seq_len: Any) -> None:
    config = RotaryConfig(head_dim=8, rotary_dim=8, theta=10000.0)
    for function in (inv_freq, attention_factor, length_range):
        with pytest.raises(ValueError, match=r"seq_len is .*; allowed: an integer of at least 1"):
            function(config, seq_len)
