"""The oracle against arithmetic done by hand, and its comparison against planted errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from oracle import MismatchError, compare, expected
from oracle.formats import FORMATS, bounds, decode


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    ],
)
def test_fp8_decoding_is_pytorchs(dtype: torch.dtype) -> None:
    # PyTorch widens fp8 exactly; only its narrowing has changed between releases.
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    np.testing.assert_array_equal(decode(codes), codes.to(torch.float64).numpy())


def test_bfloat16_decoding_is_pytorchs() -> None:
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    np.testing.assert_array_equal(decode(codes), codes.to(torch.float64).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_ieee(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(100_000) * 2.0 ** rng.uniform(-150, 140, 100_000)
    with np.errstate(over="ignore"):
        single = exact.astype(np.float32)
    want = torch.from_numpy(single).to(dtype).double().numpy()
    np.testing.assert_array_equal(FORMATS[dtype].round(single.astype(np.float64)), want)


@pytest.mark.parametrize(
    ("exact", "stored"),
    [
        (448.0, 448.0),
        (464.1, 448.0),
        (1e30, 448.0),
        (-math.inf, -448.0),
        (17.0, 16.0),
        (19.0, 20.0),
        (17.1, 18.0),
        (2.0**-9, 2.0**-9),
        (2.0**-10, 0.0),
        (2.0**-10 * 1.01, 2.0**-9),
        (3 * 2.0**-10, 2.0**-8),
        (math.nan, math.nan),
    ],
)
def test_e4m3_rounding_by_hand(exact: float, stored: float) -> None:
    low, high = bounds(torch.float8_e4m3fn, np.array([exact]), np.array([0.0]))
    np.testing.assert_array_equal([low[0], high[0]], [stored, stored])


@pytest.mark.parametrize(
    ("exact", "stored"), [(57344.0, 57344.0), (1e9, 57344.0), (2.0**-16, 2.0**-16), (2.0**-17, 0.0)]
)
def test_e5m2_rounding_by_hand(exact: float, stored: float) -> None:
    assert float(FORMATS[torch.float8_e5m2].round(np.array([exact]))[0]) == stored


@pytest.mark.parametrize(
    ("exact", "stored"),
    [(1e9, 240.0), (-math.inf, -240.0), (2.0**-10, 2.0**-10), (2.0**-11, 0.0), (1.0625, 1.0)],
)
def test_e4m3fnuz_rounding_by_hand(exact: float, stored: float) -> None:
    assert float(FORMATS[torch.float8_e4m3fnuz].round(np.array([exact]))[0]) == stored


def _rope_args(interleaved: bool) -> dict[str, Any]:
    # Angles 90 and 180 degrees at position 1; the last two dims pass through.
    table = torch.tensor([[1.0, 1, 0, 0], [0, -1, 1, 0]])
    return {
        "q": torch.tensor([[[1.0, 2, 3, 4, 5, 6]], [[1, 2, 3, 4, 5, 6]]]),
        "k": None,
        "cos_sin_cache": table,
        "positions": torch.tensor([1, 2]),
        "interleaved": interleaved,
    }


@pytest.mark.parametrize(
    ("interleaved", "turned"), [(False, [-3.0, -2, 1, -4]), (True, [-2.0, 1, -3, -4])]
)
def test_rotation_by_hand(interleaved: bool, turned: list[float]) -> None:
    (q,) = expected("rope_", _rope_args(interleaved))
    assert q.value[0, 0, :4].tolist() == turned
    # Dims past the table and the token past its end have nothing done to them.
    assert q.written[0, 0].tolist() == [True] * 4 + [False] * 2
    assert not q.written[1].any()


def _after(changes: dict[tuple[int, ...], float]) -> tuple[dict[str, Any], dict[str, Any]]:
    before, after = _rope_args(False), _rope_args(False)
    after["q"][0, 0, :4] = torch.tensor([-3.0, -2, 1, -4])
    for index, value in changes.items():
        after["q"][index] = value
    return before, after


def test_comparison_accepts_what_is_right() -> None:
    before, after = _after({(0, 0, 0): -3.0000002})
    compare(before, after, expected("rope_", before))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        ((0, 0, 0), -3.00001, r"q\[0, 0, 0\] is"),
        ((0, 0, 1), math.nan, r"q\[0, 0, 1\] is"),
        ((0, 0, 5), 6.000001, r"q\[0, 0, 5\] changed"),
        ((1, 0, 0), math.nan, r"q\[1, 0, 0\] changed"),
    ],
)
def test_comparison_sees_an_error(index: tuple[int, ...], value: float, message: str) -> None:
    before, after = _after({index: value})
    with pytest.raises(MismatchError, match=message):
        compare(before, after, expected("rope_", before))


def test_comparison_sees_a_write_outside_the_view() -> None:
    args, later = ({**_rope_args(False), "q": torch.zeros(2, 1, 10)[:, :, 2:8]} for _ in range(2))
    later["q"].as_strided((1,), (1,), 9)[0] = 1
    with pytest.raises(MismatchError, match="outside every view"):
        compare(args, later, expected("rope_", args))
