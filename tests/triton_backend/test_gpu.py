"""What only a GPU shows: graphs, addresses, memory of real size, every size of program."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ropool
from ops import grids
from ops.backend import Backend, gpu, required_backends
from ops.calls import Case, arguments, check_args
from ops.memory import placed
from oracle import compare, expected
from ropool.backends import triton
from ropool.dispatch import OPS, cache, tuning

TRITON = Backend("triton", gpu() or "cpu")
pytestmark = pytest.mark.skipif(
    gpu() is None
    or triton.available() is not None
    or (torch.version.cuda is not None and "triton" not in required_backends()),
    reason="no GPU, or one with kernels of its own: ROPOOL_REQUIRE_BACKENDS=triton asks for these",
)
KV = Case(tokens=6, mistakes=True)


def run(op: str, args: dict[str, Any]) -> None:
    getattr(ropool, op)(**args, backend="triton")


@pytest.fixture
def graphs() -> None:
    if TRITON.device != "cuda":
        pytest.skip("no CUDA graphs")


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel is loaded."""
    from ropool.backends.triton import launch

    monkeypatch.setattr(launch, "_compiled", {})
    cache.clear()
    yield
    cache.clear()


@pytest.mark.parametrize("op", OPS)
def test_graph_replays_with_what_stands_in_its_inputs(op: str, graphs: None) -> None:
    """Positions, slots and padding are changed in place between replays."""
    rotates_and_stores = op in ("rope_store_kv_", "rope_store_mla_")
    case = Case(op=op, tokens=6, mistakes=True, q_out="model" if rotates_and_stores else None)
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
        compare(before, args, expected(op, before))


def test_cold_kernel_in_a_capture_says_to_warm_up(cold: None, graphs: None) -> None:
    args = placed(arguments(KV), "cuda")
    torch.cuda.synchronize()
    refused = pytest.raises(RuntimeError, match=r"ropool.rope_store_kv_: .* warm up")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        run("rope_store_kv_", args)
    torch.cuda.synchronize()
    check_args("rope_store_kv_", arguments(KV), TRITON)


def shifted(args: dict[str, Any], name: str, shift: int) -> dict[str, Any]:
    """The arguments with a tensor at an address that is no multiple of 16 bytes."""
    tensor = args[name]
    storage = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    moved = storage.as_strided(tensor.shape, tensor.stride(), 8 + shift)
    return {**args, name: moved.copy_(tensor)}


def test_cold_alignment_in_a_capture_says_to_warm_up(cold: None, graphs: None) -> None:
    args = arguments(KV)
    check_args("rope_store_kv_", args, TRITON)
    moved = placed(shifted(args, "k", 1), "cuda")
    torch.cuda.synchronize()
    refused = pytest.raises(RuntimeError, match=r"ropool.rope_store_kv_: .* warm up")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        run("rope_store_kv_", moved)
    torch.cuda.synchronize()
    check_args("rope_store_kv_", shifted(args, "k", 1), TRITON)


@pytest.mark.parametrize("name", ["q", "k", "v", "k_pool", "v_pool", "cos_sin_cache"])
@pytest.mark.parametrize("shift", [1, 2, 4])
def test_same_shapes_at_an_odd_address(name: str, shift: int) -> None:
    """The launch of a signature is reused, though its vectors are too wide for the new address."""
    args = arguments(Case(tokens=5, seed=shift, table_dtype="model"))
    check_args("rope_store_kv_", args, TRITON)
    check_args("rope_store_kv_", shifted(args, name, shift), TRITON)


def test_a_launch_keeps_no_tensor_alive() -> None:
    """The launch is bound for the tensors that are watched, by a kernel that is compiled already:
    what a compiler's run leaves behind is not ours. `test_launch.py` watches the first call."""
    run("rope_store_kv_", placed(arguments(Case(tokens=11)), TRITON.device))
    cache.clear()
    args = placed(arguments(Case(tokens=11)), TRITON.device)
    run("rope_store_kv_", args)
    alive = {
        name: weakref.ref(value) for name, value in args.items() if isinstance(value, torch.Tensor)
    }
    del args
    gc.collect()
    kept = {name: gc.get_referrers(ref()) for name, ref in alive.items() if ref() is not None}
    assert kept == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_pool_past_every_32_bit_limit(dtype: torch.dtype) -> None:
    """More than 2**32 elements and bytes, really allocated."""
    module = torch.get_device_module(TRITON.device)
    if module.mem_get_info()[0] < 12 << 30 or os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        pytest.skip("needs 12 GiB of GPU memory for each worker")
    heads, dim, device = 2, 128, TRITON.device
    slots = (1 << 32) // (heads * dim) + 4096
    pool = torch.zeros(slots, heads, dim, dtype=torch.uint8, device=device).view(torch.uint8)
    pools = [pool.view(dtype)] if dtype.itemsize == 1 else []
    if not pools:
        pools = [torch.zeros(slots, heads, dim, dtype=dtype, device=device)]
    k = torch.randn(4, heads, dim, device=device).to(torch.bfloat16)
    limits = [1 << 31, 1 << 32]
    mapping = torch.tensor([0, *(limit // (heads * dim) for limit in limits), slots - 1]).to(device)
    ropool.store_kv_(k, k, pools[0], pools[0], mapping, layout="slots", backend="triton")
    got = pools[0].view(torch.uint8)[mapping].view(dtype).float()
    torch.testing.assert_close(got, k.to(dtype).float(), rtol=0, atol=0)
    assert int(pools[0].view(torch.uint8).flatten(1).any(dim=1).sum()) == 4


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("vectors", [1, 2, 4, 8])
def test_every_size_of_program(warps: int, vectors: int) -> None:
    """The grid's calls are small; here they are cut as larger calls may be."""
    part = 4 * (warps.bit_length() - 1) + vectors.bit_length() - 1
    with tuning.trying({"warps": warps, "vectors": vectors}):
        for case in grids.half_of_all()[part::16]:
            check_args(case.op, arguments(case), TRITON)
