"""`ROPOOL_CHECK=1`: slots and positions out of range raise, with all that finds the mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import Case, arguments, check_args
from ops.memory import placed
from oracle.compare import storage_bytes, tensors_of
from ropool.dispatch import settings

STORES = ["rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"]
ROTATES = ["rope_", "rope_store_kv_", "rope_store_mla_"]


@pytest.fixture(autouse=True)
def checks_on() -> Iterator[None]:
    with settings.override(check=True):
        yield


def assert_index_error(op: str, args: dict[str, Any], backend: Backend, *numbers: int) -> None:
    """IndexError with the op and each of `numbers` (token, value, limit); nothing written."""
    args = placed(args, backend.device)
    before = {name: storage_bytes(tensor).clone() for name, tensor in tensors_of(args).items()}
    with pytest.raises(IndexError) as caught:
        getattr(ropool, op)(**args, backend=backend.name)
    message = str(caught.value)
    assert message.startswith(f"ropool.{op}: "), message
    for number in numbers:
        assert str(number) in message, message
    for name, old in before.items():
        assert torch.equal(old, storage_bytes(args[name])), f"{name} was written"


def small(op: str, **changes: Any) -> dict[str, Any]:
    """Four tokens, 16 slots, 37 positions."""
    case = Case(op=op, tokens=4, head_dim=16, latent_dim=24)
    return {**arguments(case), **changes}


@pytest.mark.parametrize("op", STORES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("slot", [16, 17, 2**31 - 1])
def test_slot_past_the_pool(op: str, dtype: torch.dtype, slot: int, backend: Backend) -> None:
    mapping = torch.tensor([1, -1, slot, 3], dtype=dtype)
    assert_index_error(op, small(op, slot_mapping=mapping), backend, 2, slot, 16)


@pytest.mark.parametrize("op", STORES)
def test_slot_past_the_window_map(op: str, backend: Backend) -> None:
    window = torch.arange(5)
    mapping = torch.tensor([1, 4, 2, 5])
    args = small(op, slot_mapping=mapping, window_slot_map=window)
    assert_index_error(op, args, backend, 3, 5)


@pytest.mark.parametrize("op", STORES)
def test_window_slot_past_the_pool(op: str, backend: Backend) -> None:
    window = torch.tensor([3, 16, -1])
    args = small(op, slot_mapping=torch.tensor([0, -1, 2, 1]), window_slot_map=window)
    assert_index_error(op, args, backend, 3, 16)


@pytest.mark.parametrize("op", STORES)
@pytest.mark.parametrize("padding_slot", [16, 5, 0, -9, 2**40])
def test_padding_is_no_mistake(op: str, padding_slot: int, backend: Backend) -> None:
    mapping = torch.tensor([padding_slot, 2, -1, -(2**31)])
    args = small(op, slot_mapping=mapping, padding_slot=padding_slot)
    check_args(op, args, backend)
    window = torch.tensor([1, 2, 4, -7])
    args["slot_mapping"] = torch.tensor([padding_slot, 2, -1, 3])
    check_args(op, {**args, "window_slot_map": window}, backend)
    check_args(
        op, {**args, "window_slot_map": window[:0], "slot_mapping": mapping.clamp(max=-1)}, backend
    )


@pytest.mark.parametrize("op", ROTATES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("position", [-1, 37, 2**31 - 1, -(2**31)])
def test_position_outside_the_table(
    op: str, dtype: torch.dtype, position: int, backend: Backend
) -> None:
    positions = torch.tensor([0, 36, 3, position], dtype=dtype)
    # The limit may be given as the size of the table or as its last position.
    assert_index_error(op, small(op, positions=positions), backend, 3, position)


@pytest.mark.parametrize("op", ROTATES)
def test_offset_moves_the_position_outside(op: str, backend: Backend) -> None:
    args = small(op, positions=torch.tensor([0, 30, 3, 1]))
    args["offsets"] = torch.tensor([0, 9, 3, 1], dtype=torch.int32)
    assert_index_error(op, args, backend, 1, 39)
    low = torch.tensor([-(2**31)] * 4, dtype=torch.int32)
    assert_index_error(op, small(op, positions=low, offsets=low), backend, 0, -(2**32))


@pytest.mark.parametrize("op", ROTATES)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_one_of_three_positions_outside(op: str, row: int, backend: Backend) -> None:
    positions = torch.zeros(3, 4, dtype=torch.int64)
    positions[row, 2] = 40
    half = small(op)["cos_sin_cache"].shape[1] // 2
    args = small(op, positions=positions, mrope_section=(half, 0, 0))
    assert_index_error(op, args, backend, 2, 40)


@pytest.mark.parametrize("op", ["rope_", *STORES])
def test_calls_without_mistakes_are_served(op: str, backend: Backend) -> None:
    check_args(op, small(op), backend)
    check_args(op, arguments(Case(op=op, tokens=0, head_dim=16)), backend)


def test_the_check_follows_the_setting(backend: Backend) -> None:
    """The same call, off and on again: what is remembered of one must not serve the other."""
    args = small("store_kv_", slot_mapping=torch.tensor([1, 2, 99, 3]))
    for _ in range(2):
        with settings.override(check=False):
            check_args("store_kv_", args, backend)
        assert_index_error("store_kv_", args, backend, 2, 99, 16)


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


_CALL = """
import torch, ropool
k = torch.zeros(1, 1, 8)
pool = torch.zeros(2, 1, 8)
ropool.store_kv_(k, k, pool, pool.clone(), torch.tensor([2]), layout="slots")
"""


def test_environment_variable_turns_checks_on() -> None:
    assert _run(_CALL, ROPOOL_CHECK="0").returncode == 0
    refused = _run(_CALL, ROPOOL_CHECK="1")
    assert "IndexError: ropool.store_kv_: token 0 has slot 2" in refused.stderr


def test_environment_variables_with_nonsense_are_refused() -> None:
    assert "ROPOOL_CHECK" in _run(_CALL, ROPOOL_CHECK="yes please").stderr
    refused = _run(_CALL, ROPOOL_BACKEND="abacus").stderr
    assert "abacus" in refused and "reference" in refused
