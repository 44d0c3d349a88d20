"""What only a GPU shows: graphs, streams, dependent launches, addresses, memory of real size."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import ropool
from cuda_backend.specialisations import grid_cases
from ops.backend import Backend
from ops.calls import Case, arguments, check_args
from ops.memory import placed
from oracle import compare, expected
from ropool.backends import cuda
from ropool.backends.cuda import driver, launch
from ropool.backends.cuda.shape import Shape, possible, why_not_bulk
from ropool.backends.cuda.specialise import Call
from ropool.dispatch import cache
from ropool.ops import _launches

pytestmark = pytest.mark.skipif(
    cuda.available() is not None, reason=f"backend cuda: {cuda.available()}"
)
CUDA = Backend("cuda", "cuda")
KV = Case(tokens=6, mistakes=True)


def run(op: str, args: dict[str, Any]) -> None:
    getattr(ropool, op)(**args, backend="cuda")


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is loaded."""
    monkeypatch.setattr(launch, "_functions", {})
    cache.clear()


@pytest.mark.parametrize("op", launch.ARGUMENTS)
def test_graph_replays_with_what_stands_in_its_inputs(op: str) -> None:
    """Positions, slots and padding are changed in place between replays."""
    case = Case(op=op, tokens=6, mistakes=True, q_out="model" if "store" in op else None)
    if op in ("store_kv_", "store_mla_"):
        case = Case(op=op, tokens=6, mistakes=True)
    args = placed(arguments(case), "cuda")
    run(op, placed(arguments(case), "cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(op, args)
    for seed in (3, 4, 5):
        fresh = arguments(Case(**{**vars(case), "seed": seed}))
        for name, tensor in args.items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(fresh[name])
        before = placed(args, "cpu")
        graph.replay()
        torch.cuda.synchronize()
        before = {**before, **{k: v for k, v in args.items() if not isinstance(v, torch.Tensor)}}
        compare(before, args, expected(op, before))


def test_cold_kernel_in_a_capture_says_to_warm_up(cold: None) -> None:
    args = placed(arguments(KV), "cuda")
    torch.cuda.synchronize()
    refused = pytest.raises(RuntimeError, match=r"ropool.rope_store_kv_: .* warm up")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        run("rope_store_kv_", args)
    torch.cuda.synchronize()
    check_args("rope_store_kv_", arguments(KV), CUDA)


@pytest.mark.skipif(_launches.reader() is None, reason="compiled code cannot read tensors here")
def test_a_call_that_was_made_before_is_launched_by_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As is a plan; the driver's and PyTorch's functions are there."""
    args = {sys.intern(name): value for name, value in arguments(KV).items()}
    check_args("rope_store_kv_", args, CUDA)

    def refused(*args: Any) -> None:
        raise AssertionError("this call is launched in Python")

    monkeypatch.setattr(driver.Launcher, "_start", refused)
    check_args("rope_store_kv_", args, CUDA)
    after = placed(args, "cuda")
    ropool.plan("rope_store_kv_", **after, backend="cuda")()
    compare(args, after, expected("rope_store_kv_", args))


def test_other_stream() -> None:
    args = arguments(KV)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        after = placed(args, "cuda")
        torch.cuda._sleep(50_000_000)
        after["k"].mul_(2)
        run("rope_store_kv_", after)
    stream.synchronize()
    doubled = {**args, "k": args["k"].clone()}
    doubled["k"] = placed(args, "cpu")["k"].mul_(2)
    whole = {**placed(args, "cpu")}
    whole["k"].mul_(2)
    compare(whole, after, expected("rope_store_kv_", whole))


def test_threads_that_never_used_cuda() -> None:
    args = arguments(KV)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                check_args("rope_store_kv_", args, CUDA)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("name", ["q", "k", "v", "k_pool", "v_pool", "cos_sin_cache"])
@pytest.mark.parametrize("shift", [1, 2, 4])
def test_same_shapes_at_an_odd_address(name: str, shift: int) -> None:
    """The launch of a signature is reused, though its vectors are too wide for the new address."""
    case = Case(tokens=5, seed=shift, table_dtype="model")
    check_args("rope_store_kv_", arguments(case), CUDA)
    args = arguments(case)
    tensor = args[name]
    storage = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    args[name] = storage.as_strided(tensor.shape, tensor.stride(), 8 + shift)
    args[name].copy_(tensor)
    check_args("rope_store_kv_", args, CUDA)


def test_a_position_that_the_kernel_before_writes() -> None:
    """Kernels in a chain start before the one in front has ended and guess the positions; here the
    one in front writes them, as the values of a pool."""
    tokens, table_rows = 64, 512
    generator = torch.Generator("cuda").manual_seed(0)
    where = torch.randint(
        0, table_rows, (40, tokens), dtype=torch.int32, device="cuda", generator=generator
    )
    angle = torch.arange(table_rows, device="cuda")[:, None] * torch.linspace(1, 0.01, 32).cuda()
    table = torch.cat((angle.cos(), angle.sin()), dim=1)
    pool = torch.zeros(2, tokens, 1, 1, device="cuda")
    positions = pool[1].view(torch.int32).view(tokens)
    slots = torch.arange(tokens, device="cuda")
    q = torch.randn(40, tokens, 32, 64, device="cuda", dtype=torch.bfloat16)
    want = q.clone()
    bits = where.view(torch.float32).view(40, tokens, 1, 1)

    def chain() -> None:
        for step in range(40):
            ropool.store_kv_(bits[step], bits[step], pool[0], pool[1], slots, layout="slots")
            ropool.rope_(q[step], None, table, positions)

    start = q.clone()
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for step in range(40):
        ropool.rope_(want[step], None, table, where[step], backend="reference")
    for _ in range(20):
        q.copy_(start)
        pool.zero_()
        graph.replay()
        torch.testing.assert_close(q, want, rtol=1e-2, atol=1e-2)


def test_a_launch_keeps_no_tensor_alive() -> None:
    args = placed(arguments(Case(tokens=11)), "cuda")
    run("rope_store_kv_", args)
    alive = [weakref.ref(value) for value in args.values() if isinstance(value, torch.Tensor)]
    del args
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def unturned(rows: int, width: int, sign: float = 1.0) -> torch.Tensor:
    """A table whose rotation is none, or that of half a turn."""
    half = torch.ones(rows, width // 2, device="cuda")
    return torch.cat((sign * half, 0 * half), dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_pool_past_every_32_bit_limit(dtype: torch.dtype) -> None:
    """More than 2**32 elements and bytes, really allocated, for one op after the other."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    for op in ("store_kv_", "rope_store_kv_", "store_mla_", "rope_store_mla_"):
        check_large_pool(op, dtype)


def check_large_pool(op: str, dtype: torch.dtype) -> None:
    heads, dim = (1, 576) if "mla" in op else (2, 128)
    row = heads * dim
    slots = (1 << 32) // row + 4096
    shape = (slots, dim) if "mla" in op else (slots, heads, dim)
    pool, other = (torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(2))
    # In bytes and in elements.
    limits = {limit // size // row for limit in (1 << 31, 1 << 32) for size in (1, dtype.itemsize)}
    mapping = torch.tensor([0, *sorted(limits), slots - 1], device="cuda")
    tokens = len(mapping)
    k, v = torch.randn(2, tokens, heads, dim, device="cuda").to(torch.bfloat16)
    q = torch.randn(tokens, 4, 64 if "mla" in op else dim, device="cuda").to(torch.bfloat16)
    table, positions = unturned(8, q.shape[2]), torch.arange(tokens, device="cuda")
    call, index = getattr(ropool, op), (table, positions) if op.startswith("rope") else ()
    first = (q,) if op.startswith("rope") else ()
    if "mla" in op:
        latent, rope = k[:, 0].split([512, 64], dim=1)
        call(*first, latent, rope, pool, *index, mapping, backend="cuda")
    else:
        call(*first, k, v, pool, other, *index, mapping, layout="slots", backend="cuda")
    got = pool.view(torch.uint8).view(slots, -1)
    want = k.to(dtype).view(torch.uint8).view(tokens, -1)
    assert torch.equal(got[mapping], want)
    assert int(got.any(dim=1).sum()) == tokens


def test_queries_past_every_32_bit_limit() -> None:
    """A prompt whose projection has more than 2**32 elements, rotated by half a turn."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    heads, dim = 64, 128
    tokens = (1 << 32) // (heads * dim) + 64
    q = torch.randn(tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
    want = -q
    positions = torch.arange(tokens, device="cuda") % 64
    ropool.rope_(q, None, unturned(64, dim, -1.0), positions, backend="cuda")
    assert torch.equal(q, want)


@pytest.mark.parametrize("op", launch.ARGUMENTS)
def test_a_call_allocates_nothing_on_the_device(op: str) -> None:
    args = placed(arguments(Case(op=op, tokens=6)), "cuda")
    run(op, args)

    def allocations() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    before = allocations()
    run(op, args)
    plan = ropool.plan(op, **args, backend="cuda")
    plan()
    assert allocations() == before


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_software_fp8_is_the_hardwares(
    dtype: str, monkeypatch: pytest.MonkeyPatch, cold: None
) -> None:
    """GPUs before sm_89 round in software; the results are those of the instruction."""
    every = torch.arange(1 << 16, dtype=torch.int32, device="cuda").to(torch.int16)
    values = every.view(torch.bfloat16).view(512, 1, 128)
    more = torch.randn(512, 1, 128, device="cuda").to(torch.bfloat16)

    def stored() -> torch.Tensor:
        pools = torch.zeros(2, 512, 1, 128, dtype=torch.uint8, device="cuda")
        slots = torch.arange(512, device="cuda")
        fp8 = pools.view(getattr(torch, dtype))
        ropool.store_kv_(values, more, fp8[0], fp8[1], slots, layout="slots", backend="cuda")
        return pools

    hardware = stored()
    original = launch.source_of
    monkeypatch.setattr(
        launch, "source_of", lambda *args: "#define ROPOOL_SOFTWARE_FP8\n" + original(*args)
    )
    cache.clear()
    software = stored()
    nan = values.isnan().expand(2, -1, -1, -1).clone()
    nan[1] = False
    assert torch.equal(hardware[~nan], software[~nan])
    assert bool(software.view(getattr(torch, dtype)).float()[nan].isnan().all())
    cache.clear()


SHAPES = {
    "early": Shape(4, 2, 2, 64, True, True),
    "bandwidth": Shape(2, 1, 1, 128, True, False, ahead=False, loads="cached"),
    "whole lines": Shape(2, 1, 1, 256, True, False, loads="line"),
    "plain": Shape(1, 1, 1, 96, False, False, lanes=24),
    "few lanes": Shape(1, 1, 1, 32, True, False, lanes=8),
    "joint": Shape(4, 1, 1, 128, True, False, joint=True, loads="drop_first"),
    "short vectors": Shape(2, 2, 1, 64, True, True, vector_bytes=8),
    "shortest vectors": Shape(1, 1, 1, 128, True, True, vector_bytes=4, joint=True),
    "early and joint": Shape(2, 1, 1, 64, True, True, joint=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", range(8))
def test_every_shape_of_launch(shape: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid's calls are small; here they run as calls of other sizes do."""
    monkeypatch.setattr(launch, "shape_of", lambda call, *_: possible(SHAPES[shape], call))
    cache.clear()
    for case in grid_cases()[part::8]:
        check_args(case.op, arguments(case), CUDA)
    cache.clear()


BULK = [
    *(Case(op="store_mla_", tokens=13, head_dim=64, latent_dim=latent) for latent in (512, 64)),
    Case(op="store_mla_", tokens=9, head_dim=64, dtype="float32", mistakes=True, paged=False),
    *(Case(op="store_kv_", tokens=13, mistakes=True, layout=layout) for layout in ("NHD", "slots")),
    Case(op="store_kv_", tokens=13, pages=20, v_head_dim=32, window="int64", pool_strides="kv"),
    Case(op="store_kv_", tokens=13, heads_kv=1, head_dim=128, layout="HND", padding_slot=3),
]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("case", BULK, ids=str)
def test_bulk_copies(case: Case, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the bulk copy engine came with sm_90")
    asked = []

    def shape(call: Call, *_: object) -> Shape:
        asked.append(why_not_bulk(call, 4))
        return Shape(threads=4, dependent=True, early=early, bulk=asked[-1] is None)

    monkeypatch.setattr(launch, "shape_of", shape)
    cache.clear()
    case = replace(case, pages=max(case.pages, 16))
    check_args(case.op, arguments(case), CUDA)
    cache.clear()
    assert asked == [None]
