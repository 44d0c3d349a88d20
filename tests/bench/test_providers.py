"""The tick of a row: right results pass for every provider, wrong ones of every kind do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ropool.bench import inputs as bench_inputs
from ropool.bench import providers as registry
from ropool.bench.check import difference
from ropool.bench.inputs import PAGE, Inputs, make_sets
from ropool.bench.providers import choose, providers
from ropool.bench.workload import Workload, workloads
from ropool.errors import RopoolError

CPU = torch.device("cpu")
HEADS = ["6x3x8", "2x512+64"]
SMALL = workloads(heads=HEADS, dtypes=["bfloat16", "float32"], tokens=[5])
NORMED = workloads(["rope_store_kv_"], HEADS[:1], ["bfloat16"], tokens=[5], norms=["on"])
QUERIES = workloads(
    ["rope_store_kv_", "rope_store_mla_"], HEADS, ["bfloat16"], ["fp8_e4m3"], [5], ["fp8_e4m3"]
)
QUANTISED = workloads(
    heads=HEADS, dtypes=["float16"], kv_dtypes=["fp8_e4m3", "fp8_e5m2", "fp8_ds_mla"], tokens=[5]
)


@pytest.fixture(autouse=True)
def small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets in a small pool: what is tested here is not the timing."""
    monkeypatch.setattr(bench_inputs, "MIN_SLOTS", 64 * PAGE)
    monkeypatch.setitem(bench_inputs.MAX_SETS, "cpu", 2)


@pytest.mark.parametrize("name", ["ropool.cpu", "ropool.reference", "torch.eager"])
@pytest.mark.parametrize("workload", SMALL + QUANTISED + NORMED + QUERIES, ids=Workload.describe)
@torch.no_grad()
def test_every_op_is_right(name: str, workload: Workload) -> None:
    [provider] = choose([name])
    if reason := provider.unavailable(CPU):
        pytest.skip(reason)
    inputs = make_sets(workload, CPU)[0]
    call = provider.build(workload)
    assert difference(workload, provider, call, inputs) is None


def spoil(name: str) -> Callable[[Inputs], None]:
    """A fault that a kernel could have, done to the outcome of a right call."""

    def fault(x: Inputs) -> None:
        if name == "query a little off":
            x.q[2, 1, 3] += 0.3
        elif name == "key in the wrong slot":
            x.k_pool.flatten(0, 1)[x.slots[0]] = x.k_pool.flatten(0, 1)[x.slots[1]]
        elif name == "value not written":
            x.v_pool.flatten(0, 1)[x.slots[4]] = torch.nan
        elif name == "another row overwritten":
            free = next(s for s in range(64 * PAGE) if s not in x.slots)
            x.v_pool.flatten(0, 1)[free, 0, 0] = 1.0
        elif name == "key modified":
            x.k[0, 0, 0] += 1.0

    return fault


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("query a little off", "q: 1 of 240 elements are wrong"),
        ("key in the wrong slot", "k_pool: "),
        ("value not written", "v_pool: "),
        ("another row overwritten", "v_pool: rows of other slots were written"),
        ("key modified", "k: 1 of"),
    ],
)
@torch.no_grad()
def test_a_wrong_result_is_found(fault: str, said: str) -> None:
    [workload] = workloads(["rope_store_kv_"], ["6x3x8"], ["bfloat16"], tokens=[5])
    [provider] = choose(["ropool.reference"])
    right, spoiled = provider.build(workload), spoil(fault)

    def call(x: Inputs) -> None:
        right(x)
        spoiled(x)

    inputs = make_sets(workload, CPU)[0]
    wrong = difference(workload, provider, call, inputs)
    assert (
        wrong is not None
        and wrong.startswith(said)
        and (fault == "key in the wrong slot" or said in wrong)
    )
    assert difference(workload, provider, right, inputs) is None  # the pool is as it was


@torch.no_grad()
def test_a_provider_may_clear_pages_only_if_it_says_so() -> None:
    [workload] = workloads(["rope_store_kv_"], ["6x3x8"], ["bfloat16"], tokens=[5])
    [provider] = choose(["ropool.reference"])
    right = provider.build(workload)
    inputs = make_sets(workload, CPU)[0]
    inputs.k_pool.fill_(3.0)
    page, row = int(inputs.slots[0]) // PAGE, int(inputs.slots[0]) % PAGE

    def clearing(value: float) -> Callable[[Inputs], None]:
        def call(x: Inputs) -> None:
            right(x)
            x.k_pool[page, row - 1] = value

        return call

    allowed = replace(provider, clears_pages=True)
    assert difference(workload, allowed, clearing(0.0), inputs) is None
    inputs.k_pool.fill_(3.0)
    wrong = "k_pool: rows of other slots were written"
    assert difference(workload, allowed, clearing(1.0), inputs) == wrong
    inputs.k_pool.fill_(3.0)
    assert difference(workload, provider, clearing(0.0), inputs) == wrong


def test_unknown_provider_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RopoolError, match=r"provider 'fast' is unknown; known: ropool\.cpu, .*eager"
    ):
        choose(["torch.eager", "fast"])


def test_a_name_is_registered_once() -> None:
    [eager] = choose(["torch.eager"])
    with pytest.raises(ValueError, match="registered already"):
        registry.register(eager)


def test_every_backend_is_a_provider() -> None:
    names = list(providers())
    assert {"ropool.cpu", "ropool.reference", "torch.eager", "torch.compiled"} <= set(names)


def test_slots_and_positions_are_distinct_and_inside() -> None:
    for tokens in (1, 40, 300):
        [workload] = workloads(["rope_store_kv_"], ["2x1x8"], ["float32"], tokens=[tokens])
        sets = make_sets(workload, CPU)
        for x in sets:
            slots = x.k_pool.shape[0] * PAGE
            assert slots >= 2 * tokens * len(sets)
            assert x.slots.unique().numel() == x.positions.unique().numel() == tokens
            assert x.slots.min() >= 0 and x.slots.max() < slots
