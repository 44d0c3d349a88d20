"""Every family that the engine covers is compared with `transformers` by `benchmarks/decode.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ropool.integrations.transformers import FAMILIES


def test_the_comparison_has_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    import decode_models

    assert {*decode_models.FAMILIES, *decode_models.ALIKE} == {*FAMILIES}
    assert {*decode_models.ALIKE.values()} <= {*decode_models.FAMILIES}
