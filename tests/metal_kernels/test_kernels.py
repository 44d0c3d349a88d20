"""The `.metal` file itself, compiled as C++ and run over the grid that the host code lays out."""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from metal_kernels.cases import PER_THREAD, check, random_call
from metal_kernels.compiler import METAL
from metal_kernels.cross_compile import check_kernels
from metal_kernels.harness import DTYPES, KERNELS, Shape, run, width_of
from ops.test_large_addresses import Space


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_random_calls(lib: ctypes.CDLL, kernel: str, dtype: torch.dtype) -> None:
    """Until every value of each facet has met every value of each other one."""
    rng = random.Random(f"{kernel} {dtype}")
    rotates = kernel != "kv_to_pool"
    values: dict[str, tuple[int, ...]] = {
        "width": (1, 2, 4),
        "heads a thread": PER_THREAD,
        "interleaved": (0, 1),
        "partial": (0, 1) if rotates else (1,),
        "source": (0, 1, 2) if rotates else (3,),
        "odd number of KV heads": (0, 1),
        "negative slot": (0, 1),
        "slot past the end": (0, 1),
    }
    left = {
        (*names, *pair)
        for names in combinations(values, 2)
        for pair in product(*(values[name] for name in names))
    }
    for number in range(400):
        if number >= 80 and not left:
            break
        call = random_call(kernel, dtype, rng)
        before = {name: tensor.clone() for name, tensor in call.tensors.items()}
        shape, slots = call.shape, before["slots"]
        found = (
            *(width_of(lib, call), call.per_thread, int(shape.interleaved)),
            *(int(shape.rotary_dim < shape.head_dim), call.source, shape.heads_kv % 2),
            *(int((slots < 0).any()), int((slots >= call.slots).any())),
        )
        seen = combinations(zip(values, found, strict=True), 2)
        left -= {(a, b, first, second) for (a, first), (b, second) in seen}
        assert run(lib, call) == 0
        check(call, before)
    assert not left


@pytest.mark.parametrize("width", [1, 2, 4])
def test_every_width_gives_the_same_bits(lib: ctypes.CDLL, width: int) -> None:
    rng = random.Random(5)
    found = 0
    while found < 10:
        call = random_call("rope_pool_fused", torch.bfloat16, rng)
        if width_of(lib, call) < 4:
            continue
        found += 1
        call.width = 4
        widest = {n: t.clone() for n, t in call.tensors.items()}
        run(lib, call)
        widest, call.tensors = call.tensors, widest
        call.width = width
        run(lib, call)
        for name in ("q_out", "k_out", "k_pool", "v_pool"):
            assert torch.equal(call.tensors[name], widest[name])


def test_sines_may_be_as_inaccurate_as_metal_allows(lib: ctypes.CDLL) -> None:
    rng = random.Random(3)
    for _ in range(20):
        call = random_call("rope_q", torch.float32, rng)
        call.sloppy = 4
        before = {name: tensor.clone() for name, tensor in call.tensors.items()}
        run(lib, call)
        check(call, before)


def test_kernels_where_frequencies_are_doubled_are_wrong(lib: ctypes.CDLL) -> None:
    """The oracle notices: float32 frequencies alone are off by a thousandth at 131071."""
    rng = random.Random(11)
    while True:
        call = random_call("rope_q", torch.float32, rng)
        if call.source == 0 and 131071 in call.tensors["positions"]:
            break
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    call.tensors["source"] = call.tensors["source"].clone()
    call.tensors["source"][1] = 0
    run(lib, call)
    call.tensors["source"] = before["source"]
    if call.shape.rotary_dim > 2:
        with pytest.raises(AssertionError):
            check(call, before)


def test_nothing_is_read_outside_of_a_buffer(lib: ctypes.CDLL) -> None:
    """In a process of its own, since a read past the end of a page ends it."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "metal_kernels.guarded"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert (done.returncode, last) == (0, ["done"]), f"{last} {done.stderr[-2000:]}"


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that exists where it is touched")
@pytest.mark.parametrize("kernel", ["rope_k_pool", "v_to_pool", "kv_to_pool", "rope_pool_fused"])
def test_slots_past_32_bits(lib: ctypes.CDLL, kernel: str) -> None:
    """Pools of more than 2**32 elements, of which only the rows written come into being."""
    rng = random.Random(2)
    while True:
        call = random_call(kernel, torch.bfloat16, rng)
        if call.shape.tokens > 2 and call.shape.head_dim == 256:
            break
    call.slots = 2**33 // call.tensors["k_pool"][0].nbytes + 16
    last = [call.slots - 1 - at for at in range(call.shape.tokens)]
    call.tensors["slots"] = torch.tensor(last)
    call.tensors["positions"] = torch.arange(call.shape.tokens)
    call.tensors["k_pool"], call.tensors["v_pool"] = (
        Space(call.slots * row.nbytes).view(
            (call.slots, *row.shape), (row.numel(), row.shape[1], 1), row.dtype, 0
        )
        for row in (call.tensors["k_pool"][0], call.tensors["v_pool"][0])
    )
    before = {name: t.clone() for name, t in call.tensors.items() if not name.endswith("_pool")}
    assert run(lib, call, count=False) == 0
    for at, slot in enumerate(last):
        if kernel != "v_to_pool":
            stored = before["k"] if kernel == "kv_to_pool" else call.tensors["k_out"]
            assert torch.equal(call.tensors["k_pool"][slot], stored[at])
        if kernel != "rope_k_pool":
            assert torch.equal(call.tensors["v_pool"][slot], before["v"][at])


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 2**20 + 3, 2**21])
@pytest.mark.parametrize("aligned", [0, 1])
def test_copy_pool(lib: ctypes.CDLL, size: int, aligned: int) -> None:
    shift = 0 if aligned else 2
    generator = torch.Generator().manual_seed(size)
    data = torch.randint(0, 256, (size + 64,), generator=generator, dtype=torch.uint8)
    source, target = data[-data.data_ptr() % 16 :], torch.zeros(size + 64, dtype=torch.uint8)
    target = target[-target.data_ptr() % 16 :]
    source, target = source[shift : shift + size], target[shift : shift + size]
    counts = torch.zeros(size, dtype=torch.uint8)
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (source, target, counts)]
    lib.watch(addresses[1], ctypes.c_int64(size), addresses[2])
    lib.run_copy(*addresses[:2], ctypes.c_int64(size), aligned)
    assert lib.unwatch() == 0
    assert torch.equal(source, target) and (counts == 1).all()


def test_width_and_sharing(lib: ctypes.CDLL) -> None:
    def width(head_dim: int, rotary_dim: int, multiples: int) -> int:
        shape = Shape(1, 4, 2, head_dim, rotary_dim, False)
        return int(lib.vector_width(ctypes.byref(shape), ctypes.c_int64(multiples)))

    assert width(64, 64, 4) == 4 and width(64, 64, 2) == 2 and width(64, 64, 1) == 1
    assert width(64, 60, 4) == 2  # 4 dims pass through, 30 pairs rotate
    assert width(80, 32, 4) == 4 and width(6, 6, 4) == 1 and width(7, 2, 4) == 1

    def shared(tokens: int, heads: int) -> int:
        shape = Shape(tokens, heads, 1, 128, 128, False)
        return int(lib.heads_per_thread(ctypes.byref(shape), 4))

    assert [shared(tokens, 32) for tokens in (1, 32, 33, 128, 129, 512, 513)] == [
        *(1, 1, 2, 2, 4, 4, 8)
    ]
    assert shared(10**6, 3) == 3  # never more than there are


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 7, 100_000])
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (128, 8)])
def test_grids(lib: ctypes.CDLL, kernel: str, tokens: int, heads: tuple[int, int]) -> None:
    for head_dim in (2, 64, 80, 256, 576, 4096):
        for most in (1024, 256, 100, 1):
            shape = Shape(tokens, *heads, head_dim, head_dim, False)
            out = (ctypes.c_uint32 * 6)()
            args = (ctypes.c_int(KERNELS.index(kernel)), ctypes.byref(shape), 1, 2)
            lib.grid_of(*args, ctypes.c_uint32(most), out)
            threads, group = out[:3], out[3:]
            assert threads[:2] == [-(-head_dim // 2), tokens]
            groups = [-(-count // 2) for count in heads]
            z = {"rope_q": groups[0], "rope_pool_fused": sum(groups)}.get(kernel, groups[1])
            assert threads[2] == z
            assert 1 <= group[0] * group[1] * group[2] <= min(most, 256)
            assert all(1 <= g <= t for g, t in zip(group, threads, strict=True))


def test_every_constant_stands_in_the_pipelines_key(lib: ctypes.CDLL) -> None:
    def key(values: list[int]) -> str:
        out = ctypes.create_string_buffer(200)
        lib.pipeline_key((ctypes.c_int32 * 9)(*values), out)
        return out.value.decode()

    base = [64, 32, 9, 3, 2, 0, 1, 0, 0]
    keys = {key(base), *(key([v + (at == n) for n, v in enumerate(base)]) for at in range(9))}
    assert len(keys) == 10
    # Numbers that run into each other when they are only put side by side.
    assert key([6, 43, *base[2:]]) != key([64, 3, *base[2:]])
    constants = (METAL / "kernels" / "rope_pool.metal").read_text().count("function_constant(")
    assert constants == len(base)


def test_no_kernel_divides_in_its_body() -> None:
    """What stands behind a slash or a percent sign is known when the kernel is compiled."""
    text = (METAL / "kernels" / "rope_pool.metal").read_text()
    code = re.sub(r"//.*|#.*", "", text)
    divisors = set(re.findall(r"[/%]=?\s*([\w(]+)", code))
    assert divisors <= {"2", "V", "uint(kHeadsPerThread"}, divisors


def test_types_and_address_spaces(clang: None, tmp_path: Path) -> None:
    """As C++ for OpenCL, since plain C++ has no address spaces."""
    check_kernels(tmp_path)
