"""Tables against an evaluation in extended precision of transformers' frequencies.

Not against their modules: those compute angles in float32, which at position 131071 are off by up
to 2^-8, thousands of times the 1e-6 that a table may be off. So their functions are run in float64,
and angles, cosines and sines follow in numpy's long double, apart from the code under test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ropool.rotary import RotaryConfig, cos_sin_cache
from rotary.hf_oracle import Case, cases, frequencies, in_float64

POSITIONS = 131072
# A frequency in float64 is off by 2^-52 of itself, so an angle by up to 6e-11 at the last position;
# next to a zero of cos or sin that is more than 1e-6 of the value.
ANGLE_ERROR = 1e-10


def expected_rows(case: Case, rows: np.ndarray) -> np.ndarray:
    with in_float64():
        inverse, factor = frequencies(case)
    angles = np.outer(rows.astype(np.longdouble), inverse.numpy().astype(np.longdouble))
    return np.concatenate((np.cos(angles), np.sin(angles)), axis=1) * factor


@pytest.mark.parametrize("case", cases(), ids=str)
def test_table_to_the_last_position(case: Case) -> None:
    config = RotaryConfig.from_hf(case.config, case.layer_type)
    length = case.seq_len or POSITIONS
    table = cos_sin_cache(config, length)
    assert table.shape == (length, config.rotary_dim)
    assert table.dtype == torch.float32
    rows = np.random.default_rng(0).choice(length, 1000, replace=False)
    # The first rows, the last, and both sides of a power of two.
    rows = np.concatenate((rows, np.arange(64), np.arange(4060, 4096), length - 1 - np.arange(64)))
    expected = expected_rows(case, rows)
    actual = table[torch.from_numpy(rows)].numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=ANGLE_ERROR)


def test_every_row() -> None:
    case = cases()[0]
    config = RotaryConfig.from_hf(case.config)
    length = 20_000
    with in_float64():
        inverse, _ = frequencies(case)
    angles = np.outer(np.arange(length, dtype=np.float64), inverse.numpy())
    expected = np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    actual = cos_sin_cache(config, length).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=ANGLE_ERROR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_tables_are_rounded_at_the_end(dtype: torch.dtype) -> None:
    config = RotaryConfig(head_dim=64, rotary_dim=64, theta=10000.0)
    table = cos_sin_cache(config, 9000, dtype)
    assert table.dtype == dtype
    assert torch.equal(table, cos_sin_cache(config, 9000).to(dtype))


def test_device_and_memory() -> None:
    config = RotaryConfig(head_dim=64, rotary_dim=32, theta=10000.0)
    table = cos_sin_cache(config, 8, device="cpu")
    assert table.is_contiguous()
    assert table.shape == (8, 32)
    assert cos_sin_cache(config, 8, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "max_position is 0; allowed: an integer above 0"),
        ((2.0,), "max_position is 2.0"),
        ((4, torch.float64), "dtype is torch.float64; allowed: torch.float32, torch.float16"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cos_sin_cache(RotaryConfig(head_dim=8, rotary_dim=8, theta=1e4), *arguments)
