"""Layouts: from a table, by its rules, or the default; and what a call does not allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cuda_backend.specialisations import DEVICE, bound
from ops.calls import Case, arguments
from ropool.backends.cuda.choose import _by_rules, check_tuning, shape_of
from ropool.backends.cuda.grid import threads_per_token
from ropool.backends.cuda.launch import describe
from ropool.backends.cuda.shape import (
    Shape,
    checked,
    narrowed,
    possible,
    why_not_bulk,
    why_not_joint,
)
from ropool.backends.cuda.specialise import Call
from ropool.dispatch import tuning

KV = Case(heads_q=4, heads_kv=2, head_dim=64)
STORE = Case(op="store_kv_", heads_kv=2, head_dim=64, layout="slots", pages=16)


@pytest.fixture(autouse=True)
def no_user_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setenv("ROPOOL_TUNING", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


def described(case: Case, aligned: dict[str, int] | None = None) -> Call:
    call = bound(case.op, arguments(case))
    return describe(*call, lambda name: (aligned or {}).get(name, 16))


@pytest.mark.parametrize("case", [KV, STORE], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 5000])
def test_a_device_without_a_table_has_one_layout(case: Case, tokens: int) -> None:
    call = described(case)
    call.tokens = tokens
    assert shape_of(call, "sm_80", 108, "Unheard of") == Shape()
    assert shape_of(call, "sm_90", 132, "Unheard of") == Shape(dependent=True)


def test_a_table_decides_by_tokens() -> None:
    call = described(Case(heads_q=32, heads_kv=8, head_dim=128))
    found = []
    for tokens in (1, 512, 32768):
        call.tokens = tokens
        found.append(shape_of(call, "sm_90", 132, DEVICE))
        choice = tuning.choice_of("cuda", DEVICE, call.key, tokens)
        assert choice is not None
        assert found[-1] == checked(choice)._replace(dependent=True)
    assert len(set(found)) == 3


def test_rules_hold_for_what_was_not_measured() -> None:
    call = described(Case(heads_q=6, heads_kv=2, head_dim=96))
    assert tuning.choice_of("cuda", DEVICE, call.key, 1) is None
    shapes = {}
    for tokens in (1, 32768):
        call.tokens = tokens
        shapes[tokens] = shape_of(call, "sm_90", 132, DEVICE)
    assert (shapes[1].early, shapes[32768].early) == (True, False)
    assert shapes[32768].loads == "cached"
    call.tokens = 1
    assert not shape_of(call, "sm_80", 132, DEVICE).early


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"q_rows": 0}, "q_rows is 0; allowed: 1 to 8"),
        ({"threads": 100}, "threads is 100; allowed: 1 to 32 where bulk, else multiples of 32"),
        ({"bulk": True, "threads": 64}, "threads is 64; allowed: 1 to 32 where bulk"),
        ({"threads": 2048}, "threads is 2048; allowed: 1 to 1024"),
        ({"v_rows": "2"}, "v_rows is '2'; allowed: 1 to 8"),
        ({"vector_bytes": 2}, "vector_bytes is 2; allowed: 4, 8, 16, 32"),
        ({"vector_bytes": 8.0}, "vector_bytes is 8.0; allowed: 4, 8, 16, 32"),
        ({"loads": "fast"}, "loads is 'fast'; allowed: plain, drop_first, line, cached"),
        ({"columns": 2}, "unexpected keyword argument 'columns'"),
    ],
)
def test_a_choice_that_no_kernel_has_is_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="ropool: tuning choice") as caught:
        checked(choice)
    assert message in str(caught.value)


def test_a_rule_of_another_version_changes_nothing() -> None:
    """A user's table outlives the rules that it came with."""
    known = tuning.table_of("cuda", DEVICE)
    rules = {**known.rules, "ahead_turned": 6144, "of_another_version": [{"fields": 3}, "x"]}
    check_tuning(tuning.Table("cuda", DEVICE, rules=rules))
    for case in (KV, STORE):
        for tokens in (1, 300, 32768):
            call = described(case)
            call.tokens = tokens
            assert _by_rules(call, 132, rules) == _by_rules(call, 132, known.rules)


BULK = Shape(threads=4, dependent=True, bulk=True)


@pytest.mark.parametrize("name", ["k", "v", "k_pool", "v_pool"])
def test_any_misaligned_tensor_rules_the_bulk_form_out(name: str) -> None:
    assert why_not_bulk(described(STORE), 4) is None
    assert possible(BULK, described(STORE)).bulk
    call = described(STORE, {name: 8})
    assert why_not_bulk(call, 4) is not None
    assert possible(BULK, call) == Shape(threads=128, dependent=True)


def test_the_bulk_form_needs_sm_90_and_room() -> None:
    assert not possible(BULK._replace(dependent=False), described(STORE)).bulk
    long = described(Case(op="store_kv_", heads_kv=16, head_dim=128, layout="slots", pages=16))
    assert possible(BULK, long).bulk
    assert not possible(BULK._replace(threads=32), long).bulk


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (KV, None),
        (Case(op="rope_", head_dim=64), None),
        (Case(op="rope_", head_dim=64, has_k=False), "there are not both"),
        (Case(head_dim=64, rotary_dim=32), "not all of a head is turned"),
    ],
)
def test_when_queries_and_keys_can_share_a_thread(case: Case, reason: str | None) -> None:
    call = described(case)
    assert why_not_joint(call) == reason
    assert possible(Shape(joint=True), call).joint == (reason is None)


def test_vectors_may_be_shorter() -> None:
    call = described(KV)
    assert narrowed(call, Shape()) == call
    short = narrowed(call, Shape(vector_bytes=8))
    widths = {name: short.integers[name] for name in ("VQ", "VK", "VV")}
    assert widths == {name: call.integers[name] // 2 for name in widths}
    assert threads_per_token(short, Shape()) == 2 * threads_per_token(call, Shape())
    narrow = described(KV, {"q": 4})
    assert narrowed(narrow, Shape(vector_bytes=8)).integers["VQ"] == narrow.integers["VQ"]


def test_rows_of_other_widths_do_not_share_a_thread() -> None:
    assert why_not_joint(described(KV, {"q": 8})) == "their vectors differ in width"
