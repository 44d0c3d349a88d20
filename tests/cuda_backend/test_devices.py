"""More than one device: errors for tensors that are spread over several, and calls on a device that
is not the current one."""

from __future__ import annotations

import inspect
import threading
from functools import partial
from typing import Any

import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import Case, arguments, check_args
from ops.memory import placed
from oracle import compare, expected
from oracle.compare import tensors_of
from ropool.backends import cuda
from ropool.backends.cuda import launch
from ropool.dispatch import cache

pytestmark = pytest.mark.skipif(
    cuda.available() is not None, reason=f"backend cuda: {cuda.available()}"
)
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
OTHERS = ["cpu", *(["cuda:1"] if torch.cuda.device_count() > 1 else [])]
SECOND = Backend("cuda", "cuda:1")


def case_of(op: str, seed: int = 0) -> Case:
    return Case(op=op, tokens=6, seed=seed, mistakes=True)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("op", launch.ARGUMENTS)
def test_a_tensor_on_another_device_is_named(op: str, other: str) -> None:
    """Also when the same call has just been right, and its launch is known."""
    call = getattr(ropool, op)
    args = placed(arguments(case_of(op)), "cuda:0")
    call(**args, backend="cuda")
    given = tensors_of(args)
    first, *rest = (name for name in inspect.signature(call).parameters if name in given)
    for name in rest:
        moved = args | {name: args[name].to(other)}
        wrong = rf"ropool\.{op}: {name} is on {other}, {first} is on cuda:0"
        for make in (call, partial(ropool.plan, op)):
            with pytest.raises(ValueError, match=wrong):
                make(**moved, backend="cuda")
    wrong = rf"ropool\.{op}: {rest[0]} is on cuda:0, {first} is on {other}"
    with pytest.raises(ValueError, match=wrong):
        call(**(args | {first: args[first].to(other)}))


def check_on_second(op: str, seed: int, run: Any) -> None:
    """`run(args)` on tensors of the second device, while the first is the current one."""
    before = arguments(case_of(op, seed))
    after = placed(before, SECOND.device)
    assert torch.cuda.current_device() == 0
    run(after)
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    compare(before, after, expected(op, before))


@two_devices
@pytest.mark.parametrize("op", launch.ARGUMENTS)
def test_the_current_device_does_not_matter(op: str) -> None:
    call = getattr(ropool, op)
    for seed in range(3):
        check_on_second(op, seed, lambda args: call(**args, backend="cuda"))
        check_args(op, arguments(case_of(op, seed)), Backend("cuda", "cuda:0"))
        check_on_second(op, seed, lambda args: ropool.plan(op, **args, backend="cuda")())
        with torch.cuda.device(1):
            check_args(op, arguments(case_of(op, seed)), SECOND)
            check_args(op, arguments(case_of(op, seed)), Backend("cuda", "cuda:0"))


@two_devices
@pytest.mark.parametrize("op", launch.ARGUMENTS)
def test_each_device_has_kernels_of_its_own(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: dict[tuple[str, int], Any] = {}
    monkeypatch.setattr(launch, "_functions", loaded)
    cache.clear()
    for device in ("cuda:1", "cuda:0", "cuda:1", "cuda:0"):
        check_args(op, arguments(case_of(op)), Backend("cuda", device))
    assert sorted(device for _, device in loaded) == [0, 1]
    (_, first), (_, second) = loaded.values()
    assert first != second
    cache.clear()


@two_devices
def test_the_stream_is_that_of_the_tensors_device() -> None:
    """The first device's stream is busy; a launch there, or one that does not wait for what its own
    stream does to K, would be seen."""
    call = case_of("rope_store_kv_")
    before = arguments(call)
    streams = torch.cuda.Stream("cuda:0"), torch.cuda.Stream("cuda:1")
    ropool.rope_store_kv_(**placed(before, "cuda:1"), backend="cuda")
    after = placed(before, "cuda:1")
    torch.cuda.synchronize(1)
    with torch.cuda.stream(streams[1]), torch.cuda.stream(streams[0]):
        torch.cuda._sleep(500_000_000)
        with torch.cuda.device(1):
            torch.cuda._sleep(50_000_000)
            after["k"].mul_(2)
        assert torch.cuda.current_device() == 0
        ropool.rope_store_kv_(**after, backend="cuda")
    streams[1].synchronize()
    assert not streams[0].query(), "the other stream has not been waited for"
    whole = placed(before, "cpu")
    whole["k"].mul_(2)
    compare(whole, after, expected("rope_store_kv_", whole))
    streams[0].synchronize()


@two_devices
@pytest.mark.parametrize("op", launch.ARGUMENTS)
def test_a_graph_of_the_second_device(op: str) -> None:
    args = placed(arguments(case_of(op)), "cuda:1")
    with torch.cuda.device(1):
        getattr(ropool, op)(**placed(arguments(case_of(op)), "cuda:1"), backend="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # its own is of the first device
            getattr(ropool, op)(**args, backend="cuda")
    for seed in (3, 4):
        fresh = arguments(case_of(op, seed))
        for name, tensor in tensors_of(args).items():
            tensor.copy_(fresh[name])
        torch.cuda.synchronize(1)
        before = {**args, **placed(tensors_of(args), "cpu")}
        with torch.cuda.device(1):
            graph.replay()
        torch.cuda.synchronize(1)
        compare(before, args, expected(op, before))


@two_devices
@pytest.mark.parametrize("sets_device", [False, True])
def test_two_threads_on_two_devices(sets_device: bool) -> None:
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            if sets_device:
                torch.cuda.set_device(index)
            for seed in range(30):
                args = arguments(case_of("rope_store_kv_", seed % 5))
                check_args("rope_store_kv_", args, Backend("cuda", f"cuda:{index}"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert torch.cuda.current_device() == 0
