"""The tuner finds the fastest layout, on tensors of its own, and what it writes is then used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ropool
from ropool import dispatch
from ropool.bench import events, scratch
from ropool.bench import tune as tuner
from ropool.bench.scratch import VARIANTS, Subject
from ropool.bench.timing import Samplers
from ropool.cli.main import main
from ropool.dispatch import OPS, tuning
from ropool.dispatch.key import Key
from ropool.errors import RopoolError
from ropool.ops._call import described as call_of

CPU = torch.device("cpu")
MICROSECONDS = {(1, 0): 9.0, (2, 0): 5.0, (3, 0): 7.0, (2, 1): 4.0, (2, 2): 3.99, (3, 1): 6.0}


class FakeTimer:
    """Takes a layout's time from a list; what is in force before counts 10."""

    def __init__(self, device: torch.device) -> None:
        self.calls = 0

    def prepare(self, call: Callable[[Any], object], sets: Sequence[Any]) -> Samplers:
        for arguments in sets:
            call(arguments)
        choice = tuning.choice_of("reference", "", KEY, 1)
        time = 10.0 if choice is None else MICROSECONDS[choice["a"], choice.get("b", 0)]
        return Samplers(lambda: time)


KEY = Key(op="rope_", dtype="bfloat16")
CANDIDATES = SimpleNamespace(
    layouts=lambda key, tokens: [{"a": a} for a in (1, 2, 3)],
    refinements=lambda key, tokens, choice: [
        {**choice, "b": b} for b in (1, 2) if (choice["a"], b) in MICROSECONDS
    ],
)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("ROPOOL_TUNING", str(tmp_path))
    monkeypatch.setattr(tuner, "CudaTimer", FakeTimer)
    monkeypatch.setattr(tuner, "candidates_of", lambda backend: CANDIDATES)
    monkeypatch.setattr(tuner, "LEAST_SETS", 1)
    monkeypatch.setattr(tuner, "MOST_SETS", 1)
    tuning.forget()
    yield
    tuning.forget()


def test_the_fastest_layout_wins_when_it_is_faster_by_more_than_noise() -> None:
    subject = scratch.subject("rope_", "4x2x8", "bfloat16", "plain")
    assert subject is not None
    _, found = tuner.Tuner("reference", CPU).tune(subject, 3)
    assert (found.choice, found.best_us, found.before_us) == ({"a": 2, "b": 2}, 3.99, 10.0)


def test_what_is_in_force_stays_when_no_other_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"a": 2, "b": 1}
    monkeypatch.setattr(CANDIDATES, "in_force", lambda *asked: now, raising=False)
    subject = scratch.subject("rope_", "4x2x8", "bfloat16", "plain")
    assert subject is not None
    _, found = tuner.Tuner("reference", CPU).tune(subject, 3)
    assert (found.choice, found.best_us, found.before_us) == (now, 4.0, 4.0)


def described(subject: Subject | None) -> Key:
    """The key of such a call, which the reference runs."""
    assert subject is not None
    arguments = scratch.arguments(subject, 5, CPU)
    getattr(ropool, subject.op)(**arguments, backend="reference")
    key, _ = call_of("tune", subject.op, (), arguments).key()
    return key


@pytest.mark.parametrize("variant", [*VARIANTS, "norm+fp8_pool", "q_out+write_k+fp8_ds_mla"])
@pytest.mark.parametrize("op", OPS)
def test_every_subject_is_a_call_of_its_op(op: str, variant: str) -> None:
    heads = "4x512+64" if "mla" in op else "4x2x16"
    subject = scratch.subject(op, heads, "bfloat16", variant)
    assert scratch.subject(op, "4x2x16" if "mla" in op else "4x512+64", "bfloat16", variant) is None
    if subject is None:
        assert variant != "plain"
        return
    key, parts = described(subject), variant.split("+")
    packed, fp8 = "fp8_ds_mla" in parts, {"fp8", "fp8_pool"} & set(parts)
    pool = "float8_e4m3fn" if fp8 else "uint8" if packed else "bfloat16"
    assert key.pool_dtype == (None if op == "rope_" else pool)
    assert (key.row_format == "fp8_ds_mla") == packed
    assert key.write_k == ("write_k" in parts)
    assert (key.q_norm_dtype is not None) == ("norm" in parts)
    query = {"fp8": "float8_e4m3fn", "q_out": "bfloat16"}
    rotates = op.startswith("rope")
    assert key.q_out_dtype == next((query[p] for p in parts if rotates and p in query), None)


def test_every_kind_of_call_can_be_tuned() -> None:
    """Each field that a table is indexed by takes each of its values for some subject."""
    found: dict[str, set[Any]] = {}
    for op, heads, variant in itertools.product(
        OPS, ("4x2x16", "4x2x16/8", "4x512+64"), (*VARIANTS, "q_out+fp8_pool", "norm+write_k")
    ):
        subject = scratch.subject(op, heads, "bfloat16", variant)
        if subject is not None:
            for name, value in tuning.subject(described(subject)):
                found.setdefault(f"{op} {name}", set()).add(value)
    rotating, mla = ("rope_store_kv_", "rope_store_mla_"), ("store_mla_", "rope_store_mla_")
    for op in OPS:
        assert found.get(f"{op} pool_bytes", {1, 2}) == {1, 2}
        assert found.get(f"{op} q_out_bytes") == ({1, 2} if op in rotating else None)
        assert found.get(f"{op} write_k") == ({True} if op in rotating else None)
        assert found.get(f"{op} packed_row") == ({True} if op in mla else None)
        assert found.get(f"{op} norm") == ({True} if op == "rope_store_kv_" else None)
    assert found["rope_ rotary_dim"] == found["rope_store_kv_ rotary_dim"] == {8, 16}
    fp8_pool = scratch.subject("rope_store_kv_", "4x2x16", "bfloat16", "fp8_pool")
    assert ("pool_bytes", 1) in tuning.subject(described(fp8_pool))
    assert "q_out_bytes" not in dict(tuning.subject(described(fp8_pool)))


@pytest.mark.parametrize(
    ("op", "heads", "variant"),
    [
        ("store_kv_", "4x2x16/8", "plain"),
        ("store_kv_", "4x2x16", "fp8_pool"),
        ("rope_store_kv_", "4x2x16", "fp8+fp8_pool"),
        ("rope_store_kv_", "4x2x16", "fp8+q_out"),
        ("rope_store_mla_", "4x256+64", "fp8_ds_mla"),
        ("rope_store_mla_", "4x512+64", "fp8_ds_mla+fp8"),
    ],
)
def test_what_does_not_go_together(op: str, heads: str, variant: str) -> None:
    assert scratch.subject(op, heads, "bfloat16", variant) is None


def test_what_was_found_is_used_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    subject = Subject("rope_", "4x2x8", "bfloat16", "plain")
    [(_, table)] = tuner.tune("reference", CPU, [subject], [3])
    tuning.write(table, tmp_path)
    key = Key(op="rope_", dtype="float16", heads_q=4, heads_kv=2, head_dim=8, rotary_dim=8)
    assert tuning.choice_of("reference", "Some GPU", key, 100) == {"a": 2, "b": 2}
    assert table.measured_with["ropool"] == ropool.__version__


def test_a_backend_without_layouts_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(RopoolError, match="backend cpu has no layouts to choose from"):
        tuner.candidates_of("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_tune(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "ropool: tune: PyTorch sees no GPU\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "rope"], "tune: op is 'rope'; known: rope_, "),
        (["--dtype", "int8"], "tune: dtype is 'int8'; known: bfloat16"),
        (["--variant", "fast"], "tune: variant is 'fast'; known: plain, norm"),
        (["--variant", "norm+fast"], "tune: variant is 'norm+fast'; known: plain, norm"),
        (["--variant", "plain+norm"], "tune: variant is 'plain+norm'; known: plain, norm"),
        (["--heads", "4x2x16/9"], "heads are '4x2x16/9'; allowed behind the slash"),
        (["--heads", "4x2x16/18"], "heads are '4x2x16/18'; allowed behind the slash"),
        (["--heads", "4x2x16/"], "heads are '4x2x16/'; allowed behind the slash"),
        (["--heads", "4x512+64/32"], "heads are '4x512+64/32'; allowed behind the slash"),
        (["--heads", "4x512+64", "--op", "rope_"], "do not go together"),
        (["--heads", "4"], "ropool: tune: heads are '4'; expected"),
        (["--tokens", "0"], "ropool: tune: tokens is '0'; allowed: whole numbers from 1"),
        (["--tokens", "8,-3"], "ropool: tune: tokens is '-3'; allowed"),
        (["--tokens", "9" * 5000], "ropool: tune: tokens is '9999"),
        (["--backend", "nope"], "ropool: tune: backend is 'nope'; known: cpu, reference"),
        (["--backend", "metal"], "ropool: tune: backend metal cannot be used: because"),
        (["--backend", "reference", "--out", "/proc/none/here"], "cannot write to /proc/none/here"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        dispatch, "unavailable", lambda name: "because" if name == "metal" else None
    )
    monkeypatch.setattr(tuner, "Tuner", None)  # nothing is measured
    assert main(["tune", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_events_time_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def call(milliseconds: float) -> None:
        clock[0] += milliseconds

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(events, "FLUSH_BYTES", 64)
    sample = events.EventTimer(CPU).prepare(call, [0.001, 0.003]).overlapping
    assert sample() == pytest.approx(2.0)
    assert sample() == pytest.approx(2.0)


def test_prompts_fill_whole_pages() -> None:
    subject = scratch.subject("rope_store_kv_", "4x2x32", "bfloat16", "plain")
    assert subject is not None
    call = scratch.arguments(subject, 512, CPU)
    assert torch.equal(call["positions"], torch.arange(512))
    pages = call["slot_mapping"].view(-1, 16)
    assert torch.equal(pages - pages[:, :1], torch.arange(16).expand(32, 16))
    assert not torch.equal(pages[:, 0], pages[:, 0].sort().values)
    decode = scratch.arguments(subject, 16, CPU)
    assert decode["slot_mapping"].div(16, rounding_mode="floor").unique().numel() == 16
