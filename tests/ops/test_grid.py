"""Every backend against the oracle over the pairwise grids."""

from __future__ import annotations

import pytest

from ops import grids
from ops.backend import Backend
from ops.calls import Case, arguments, check, check_stored


@pytest.mark.parametrize("case", grids.rope_cases(), ids=str)
def test_rope(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", grids.rope_store_kv_cases(), ids=str)
def test_rope_store_kv(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", grids.store_kv_cases(), ids=str)
def test_store_kv(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", grids.store_mla_cases(), ids=str)
def test_store_mla(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", grids.rope_store_mla_cases(), ids=str)
def test_rope_store_mla(case: Case, backend: Backend) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", grids.fnuz_cases(), ids=str)
def test_fnuz(case: Case, backend: Backend) -> None:
    check_stored(case.op, arguments(case), backend)
