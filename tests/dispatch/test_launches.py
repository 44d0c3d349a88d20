"""What a repeated call is looked up by, and the compiled way that it then takes: it sees what
attributes tell apart, runs no Python, and leaves every other call to the definition."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ropool
from ropool.dispatch import cache, settings
from ropool.ops import _launches, rope
from ropool.ops._launches import ByAttributes

TENSORS = [
    torch.zeros(4, 2, 8),
    torch.zeros(4, 2, 8, dtype=torch.float16),
    torch.zeros(4, 2, 8, dtype=torch.bfloat16),
    torch.zeros(4, 2, 8, dtype=torch.int32),
    torch.zeros(4, 2, 8, dtype=torch.uint8),
    torch.zeros(4, 2, 8, dtype=torch.float8_e4m3fn),
    torch.zeros(4, 2, 8, dtype=torch.float8_e5m2),
    torch.zeros(4, 2, 8, dtype=torch.float8_e4m3fnuz),
    torch.zeros(4, 8, 2).transpose(1, 2),
    torch.zeros(4, 2, 16)[..., :8],
    torch.zeros(4, 16),
    torch.zeros(64),
    torch.zeros(()),
    torch.zeros(0, 2, 8),
    torch.zeros(1, 1, 1, 1, 1, 1, 8),
    torch.zeros(4, 2, 8, device="meta"),
]
OPTIONS = [None, True, False, 0, 1, -1, 1.0, 0.5, "", "NHD", "slots", (1, 2, 3), (1, 2), ()]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    cache.clear()
    yield
    cache.clear()


@pytest.fixture
def compiled() -> None:
    if _launches.reader() is None:
        pytest.skip("compiled code cannot read tensors here")


def launch(args: Any) -> None:
    """Something to keep."""


def made(tensors: int, options: int) -> list[_launches.Launches]:
    return [_launches.launches(tensors, options), ByAttributes()]


def test_equal_metadata_and_nothing_else_finds_a_launch() -> None:
    pairs: list[tuple[Any, Any]] = list(itertools.product([*TENSORS, None], repeat=2))
    for index, kept in enumerate(pairs):
        for table in made(2, 0):
            table.keep(kept, (), None, launch, table.epoch())
            for other, args in enumerate(pairs):
                assert (table.find(args, (), None) is launch) == (index == other), (kept, args)
    for table in made(1, 0):
        for tensor in TENSORS:
            table.keep((tensor,), (), None, launch, table.epoch())
            again = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            assert table.find((again,), (), None) is launch
        parameter = torch.nn.Parameter(torch.zeros(4, 2, 8))
        assert table.find((parameter,), (), None) is None
        with torch.no_grad():
            assert table.find((parameter,), (), None) is launch
        assert len(table) == len(TENSORS)
        table.clear()
        assert len(table) == 0
        assert table.find((TENSORS[0],), (), None) is None


def test_equal_options_and_nothing_else_find_a_launch() -> None:
    pairs: list[tuple[Any, ...]] = list(itertools.product(OPTIONS, repeat=2))
    for index, kept in enumerate(pairs):
        for table in made(0, 2):
            table.keep((), kept, None, launch, table.epoch())
            for other, options in enumerate(pairs):
                assert (table.find((), options, None) is launch) == (index == other)
            assert table.find((), kept, "cpu") is None


def test_a_table_holds_many() -> None:
    for table in made(1, 1):
        for size in range(1000):
            table.keep((torch.empty(size),), (size,), "cpu", launch, table.epoch())
        assert len(table) == 1000
        for size in range(1000):
            assert table.find((torch.empty(size),), (size,), "cpu") is launch
            assert table.find((torch.empty(size),), (size + 1,), "cpu") is None


@pytest.mark.parametrize("value", [1.0, "q", [torch.ones(3)], object()])
def test_what_is_no_tensor_is_never_kept(value: Any) -> None:
    for table in made(1, 0):
        table.keep((value,), (), None, launch, table.epoch())
        assert len(table) == 0
        assert table.find((value,), (), None) is None


def test_a_sparse_tensor_is_not_taken_for_a_plain_one() -> None:
    for table in made(1, 0):
        table.keep((torch.ones(3),), (), None, launch, table.epoch())
        assert table.find((torch.ones(3),), (), None) is launch
        assert table.find((torch.ones(3).to_sparse(),), (), None) is None


def test_a_negated_view_is_not_taken_for_a_plain_one() -> None:
    for table in made(1, 0):
        table.keep((torch.ones(3),), (), None, launch, table.epoch())
        assert table.find((torch._neg_view(torch.ones(3)),), (), None) is None


@pytest.mark.parametrize("way", ["compiled", "attributes"])
def test_calls_are_looked_up_and_mistakes_named(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call: Callable[..., None] = ropool.rope_
    if way == "attributes":
        monkeypatch.setattr(rope.OP, "launches", ByAttributes())
        call = getattr(call, "__wrapped__", call)
    table, positions = torch.ones(4, 8), torch.zeros(3, dtype=torch.int64)
    for _ in range(3):
        call(torch.ones(3, 2, 8), None, table, positions)
    assert len(rope.OP.launches) == 1
    call(torch.ones(3, 2, 16)[..., :8], None, table, positions)
    assert len(rope.OP.launches) == 2
    for wrong in (1.0, "q", [torch.ones(3, 2, 8)], None):
        with pytest.raises(TypeError, match=r"ropool.rope_: q must be a torch.Tensor, got"):
            call(wrong, None, table, positions)
    with pytest.raises((TypeError, ValueError), match=r"ropool.rope_: q "):
        call(torch.ones(3, 2, 8).to_sparse(), None, table, positions)
    with pytest.raises(ValueError, match=r"ropool.rope_: positions is on meta"):
        call(torch.ones(3, 2, 8), None, table, positions.to("meta"))
    assert len(rope.OP.launches) == 2


def test_a_tensor_that_needs_a_gradient_is_refused_after_a_call_that_did_not() -> None:
    table, positions = torch.ones(4, 8), torch.zeros(3, dtype=torch.int64)
    q = torch.ones(3, 2, 8)
    ropool.rope_(q, None, table, positions)
    needing = torch.ones(3, 2, 8, requires_grad=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"ropool.rope_: q requires grad"):
            ropool.rope_(needing, None, table, positions)
    with torch.no_grad():
        ropool.rope_(needing, None, table, positions)
    assert bool((needing != 1).any())


# --- the compiled way of a public function --------------------------------------------------------


def rope_arguments() -> tuple[Any, ...]:
    return torch.randn(3, 2, 8), None, torch.randn(4, 8), torch.tensor([1, 2, 3])


def test_a_call_that_was_made_before_runs_no_python(
    compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way its arguments are given."""
    q, k, table, positions = rope_arguments()
    want = q.clone()
    for _ in range(4):
        ropool.rope_(want, k, table, positions, mrope_section=None)

    def refused(*args: Any) -> None:
        raise AssertionError("this call is looked up in Python")

    monkeypatch.setattr(rope.OP, "_run", refused)
    ropool.rope_(q, k, table, positions)
    ropool.rope_(q, None, positions=positions, cos_sin_cache=table)
    ropool.rope_(
        backend=None, interleaved=False, q=q, k=k, cos_sin_cache=table, positions=positions
    )
    ropool.rope_(*(q, k, table), positions=positions, offsets=None)
    torch.testing.assert_close(q, want, rtol=0, atol=0)
    for other in ({"interleaved": True}, {"backend": "reference"}, {"offsets": positions}):
        with pytest.raises(AssertionError, match="looked up in Python"):
            ropool.rope_(q, k, table, positions, **other)


def test_arguments_are_refused_as_python_does() -> None:
    args = rope_arguments()
    for _ in range(2):  # before and after the call is known
        for wrong, options in (
            ((*args, False), {}),
            (args[:3], {}),
            (args, {"interleave": True}),
            (args, {"q": args[0]}),
            ((), {}),
        ):
            with pytest.raises(TypeError, match=r"rope_\(\) "):
                ropool.rope_(*wrong, **options)
        ropool.rope_(*args)
    ropool.rope_(*args, **{"".join(["inter", "leaved"]): False})
    for wrong in (0, 1, "no", None):
        with pytest.raises(TypeError, match=r"ropool.rope_: interleaved is .*, expected a bool"):
            ropool.rope_(*args, interleaved=wrong)  # type: ignore[arg-type]


def test_a_mode_sees_a_call_that_was_made_before() -> None:
    class Log(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    args = rope_arguments()
    for _ in range(2):
        ropool.rope_(*args)
    with Log():
        ropool.rope_(*args)
    assert "ropool.rope_.default" in seen

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    for at in (0, 2, 3):
        seen.clear()
        ropool.rope_(*[arg.as_subclass(Subclass) if i == at else arg for i, arg in enumerate(args)])
        assert "ropool.rope_.default" in seen, at


def test_settings_hold_for_a_call_that_was_made_before() -> None:
    args = rope_arguments()
    for _ in range(2):
        ropool.rope_(*args)
    chosen = cache.chosen["rope_"]
    with settings.override(backend="reference"):
        ropool.rope_(*args)
        assert cache.chosen["rope_"] == "reference/rope"
    args[3][1] = 7
    with (
        settings.override(check=True),
        pytest.raises(IndexError, match=r"ropool.rope_: token 1 has position 7"),
    ):
        for _ in range(2):
            ropool.rope_(*args)
    ropool.rope_(*args)
    assert cache.chosen["rope_"] == chosen


@pytest.mark.parametrize("way", ["compiled", "attributes"])
def test_a_launch_that_other_settings_have_overtaken_is_not_remembered(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another thread changes them while this one binds."""
    call: Callable[..., None] = ropool.rope_
    if way == "attributes":
        table = ByAttributes()
        monkeypatch.setattr(cache, "_tables", [*cache._tables, table])
        monkeypatch.setattr(rope.OP, "launches", table)
        call = getattr(call, "__wrapped__", call)
    args = rope_arguments()
    bind = rope.OP.bind
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:

        def overtaken(*call: Any) -> Any:
            bound = bind(*call)
            stack.enter_context(settings.override(backend="reference"))
            return bound

        patch.setattr(rope.OP, "bind", overtaken)
        call(*args)
        assert len(rope.OP.launches) == 0
        patch.undo()
        for _ in range(2):
            call(*args)
            assert cache.chosen["rope_"] == "reference/rope"
        assert len(rope.OP.launches) == 1


def test_a_call_while_all_is_forgotten_finds_no_old_decision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when another thread makes it between two of the tables."""
    args = rope_arguments()

    class Between:
        def clear(self) -> None:
            ropool.rope_(*args)

        def __len__(self) -> int:
            return 0

    ropool.rope_(*args)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_tables", [*cache._tables, Between()])
        stack = contextlib.ExitStack()
        stack.enter_context(settings.override(backend="reference"))
    with stack:
        ropool.rope_(*args)
        assert cache.chosen == {"rope_": "reference/rope"}


def test_an_error_in_a_launch_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: Any) -> None:
        raise KeyError(f"launched with {len(args)}")

    args = rope_arguments()
    monkeypatch.setattr(rope.OP, "bind", lambda *call: ("", broken))
    for _ in range(2):
        with pytest.raises(KeyError, match="launched with 5"):
            ropool.rope_(*args)


def test_a_public_function_can_be_referred_to_weakly(compiled: None) -> None:
    """As `torch.compiler.allow_in_graph` does."""
    assert ref(ropool.rope_)() is ropool.rope_
    made = _launches.native.Function(launch)
    weakly = ref(made)
    del made
    assert weakly() is None
