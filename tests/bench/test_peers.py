"""Peers where their packages are not: known by name, refused with a reason, and told the same slots
and positions in their own words."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from ropool.bench import inputs as bench_inputs
from ropool.bench.inputs import PAGE, make_sets
from ropool.bench.measure import row
from ropool.bench.peers import PEERS, flashinfer, flashinfer_generated, plain_copy
from ropool.bench.provider import Provider
from ropool.bench.providers import choose, providers
from ropool.bench.suites import HEADS, MLA_TOKENS, gpu, takes_part
from ropool.bench.timing import Timing
from ropool.bench.traffic import min_bytes
from ropool.bench.workload import Workload, workloads

CPU = torch.device("cpu")
NAMES = (
    *("copy", "copy.pdl", "triton.2025", "sglang", "sglang.unfused", "sglang.pool"),
    *(
        "sglang.triton",
        "sglang-0.5.20.tma",
        "flashinfer",
        "flashinfer.generated",
        "flashinfer.whole-query",
        "vllm",
    ),
)


@pytest.fixture(autouse=True)
def small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_inputs.MAX_SETS, "cpu", 2)
    monkeypatch.setattr(bench_inputs, "MIN_SLOTS", 1024)


def one(op: str, heads: str, tokens: int = 5, **options: list[str]) -> Workload:
    [workload] = workloads([op], [heads], ["bfloat16"], tokens=[tokens], **options)
    return workload


def test_every_peer_is_a_provider_and_none_is_imported_for_it() -> None:
    assert set(NAMES) <= set(providers())
    assert not {"sglang", "flashinfer", "vllm", "tvm_ffi"} & set(sys.modules)


@pytest.mark.parametrize("name", NAMES)
def test_a_peer_says_why_it_cannot_run_here(name: str) -> None:
    [peer] = choose([name])
    assert peer.unavailable(CPU) == "runs on NVIDIA GPUs only"


@pytest.mark.parametrize("name", ["sglang", "flashinfer", "vllm"])
def test_a_package_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    [peer] = choose([name])
    if importlib.util.find_spec(name) is None:
        assert peer.unavailable(torch.device("cuda")) == f"{name} is not installed"


@pytest.mark.parametrize(
    ("name", "covered", "not_covered"),
    [
        ("triton.2025", one("store_mla_", "16x512+64"), one("store_kv_", "9x3x64")),
        ("sglang", one("store_mla_", "16x512+64"), one("rope_store_mla_", "16x512+64")),
        ("sglang.triton", one("rope_store_kv_", "9x3x64"), one("rope_store_kv_", "8x1x96")),
        ("sglang-0.5.20.tma", one("store_mla_", "16x512+64"), one("rope_", "9x3x64")),
        ("flashinfer", one("rope_", "9x3x64"), one("rope_store_kv_", "9x3x64", norms=["on"])),
        ("flashinfer.generated", one("rope_store_kv_", "8x1x128"), one("rope_", "8x1x128")),
        (
            "flashinfer.whole-query",
            one("rope_store_mla_", "16x512+64", kv_dtypes=["fp8_e4m3"], q_dtypes=["fp8_e4m3"]),
            one("rope_store_mla_", "16x512+64"),
        ),
        (
            "vllm",
            one("rope_store_kv_", "9x3x64", kv_dtypes=["fp8_e4m3"]),
            one("rope_store_kv_", "9x3x64", q_dtypes=["fp8_e4m3"]),
        ),
    ],
)
def test_what_a_peer_covers(name: str, covered: Workload, not_covered: Workload) -> None:
    [peer] = choose([name])
    assert peer.why_not(covered) is None
    assert peer.why_not(not_covered)


@pytest.mark.parametrize(
    "workload", [one("rope_store_kv_", "9x3x64", 7), one("store_mla_", "16x512+64", 1)]
)
def test_the_copy_moves_the_minimum_bytes(workload: Workload) -> None:
    inputs = make_sets(workload, CPU)[0]
    plain_copy.prepare(workload, inputs)
    source, target = inputs.extra["copy"]
    moved = source.nbytes + target.nbytes
    assert 0 <= moved - min_bytes(workload) < 2 * plain_copy.VECTOR_BYTES
    assert plain_copy.vectors(workload) * plain_copy.VECTOR_BYTES == source.nbytes

    def half(x: object) -> None:
        target[: len(target) // 2] = source[: len(target) // 2]

    assert plain_copy.verify(lambda x: target.copy_(source), inputs) is None  # type: ignore[arg-type, return-value]
    assert plain_copy.verify(half, inputs)


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_paged_batches_name_the_same_slots(tokens: int) -> None:
    [inputs, _] = make_sets(one("rope_store_kv_", "2x1x8", tokens), CPU)
    p = flashinfer.Paged(inputs)
    page = p.pages[p.page_start[p.request] + p.position // PAGE]
    assert torch.equal(page * PAGE + p.position % PAGE, inputs.slots)
    last = p.pages.new_zeros(len(p.last_row)).scatter_reduce(
        0, p.request.long(), p.position, "amax"
    )
    assert torch.equal(p.last_row, last % PAGE + 1)

    r = flashinfer_generated.Requests(inputs)
    request = torch.searchsorted(r.start, torch.arange(tokens), right=True) - 1
    position = torch.arange(tokens) + (r.lengths - r.start[1:])[request]
    assert torch.equal(position, inputs.positions)
    slots = r.table[request, position // PAGE] * PAGE + position % PAGE
    assert torch.equal(slots, inputs.slots)


def test_a_peer_that_moves_more_is_charged_for_it() -> None:
    [peer] = choose(["flashinfer.whole-query"])
    w = one("rope_store_mla_", "16x512+64", kv_dtypes=["fp8_e4m3"], q_dtypes=["fp8_e4m3"])
    timing = Timing({peer.name: [2.0]}, {peer.name: [3.0]}, 1000.0)
    found = row(w, peer, CPU, timing, True, "")
    # 16 heads of 512 for each token, two bytes read and one written.
    assert found.min_bytes == min_bytes(w) + 5 * 16 * 512 * 3
    assert (found.p50_us, found.serial_us) == (2.0, 3.0)


def test_the_suite_has_every_shape_and_every_token_count() -> None:
    suite = gpu()
    assert len(suite) == len(set(suite))
    plain = [w for w in suite if w.op == "rope_store_kv_" and w.variant == "bfloat16"]
    assert {w.heads for w in plain} == set(HEADS)
    assert {w.tokens for w in plain} == set(MLA_TOKENS) - {65536}
    for op, pool in itertools.product(
        ("store_mla_", "rope_store_mla_"), ("bfloat16", "float8_e4m3fn", "fp8_ds_mla")
    ):
        tokens = {w.tokens for w in suite if (w.op, w.kv_dtype) == (op, pool)}
        few = {("store_mla_", "float8_e4m3fn"): 0, ("rope_store_mla_", "fp8_ds_mla"): 5}
        assert len(tokens & set(MLA_TOKENS)) == len(tokens) == few.get((op, pool), 15)
    [compiled] = choose(["torch.compiled"])
    assert 0 < sum(takes_part(w, compiled) for w in suite) < 60
    [generated] = choose(["flashinfer.generated"])
    shapes = {w.heads for w in suite if takes_part(w, generated)}
    assert shapes == {"8x1x128", "64x8x128"}
    copies: list[Provider] = [peer for peer in PEERS if peer.name.startswith("copy")]
    assert all(takes_part(w, copy) and copy.why_not(w) is None for w in suite for copy in copies)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_copy_compiles(arch: str) -> None:
    from ropool.backends.cuda import compile

    try:
        compile.compiler_version()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"cuda.core and NVRTC are not installed: {error}")
    for dependent in range(2 if arch == "sm_90" else 1):
        assert compile.compile_cubin(plain_copy.source(bool(dependent)), arch)


def test_the_2025_baseline_writes_rows() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    script = (
        "import torch\n"
        "from ropool.bench.check import difference\n"
        "from ropool.bench.inputs import make_sets\n"
        "from ropool.bench.providers import choose\n"
        "from ropool.bench.workload import workloads\n"
        "[peer] = choose(['triton.2025'])\n"
        "[work] = workloads(['store_mla_'], ['2x256+64'], ['float32'], tokens=[5])\n"
        "inputs = make_sets(work, torch.device('cpu'))[0]\n"
        "print(difference(work, peer, peer.build(work), inputs))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None", done.stdout + done.stderr
