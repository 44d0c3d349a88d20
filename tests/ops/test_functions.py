"""The public ops are functions to those who look at them: `inspect`, `help`, `pickle`, `doctest`,
`functools`, classes, `torch.compile`. With or without compiled code."""

from __future__ import annotations

import copy
import doctest
import functools
import inspect
import pickle
import pydoc
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ropool

OPS = ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"]


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Callable[..., None]:
    found: Callable[..., None] = getattr(ropool, request.param)
    return found


def module_of(op: Callable[..., None]) -> Any:
    return sys.modules[op.__module__]


def rope_arguments() -> tuple[Any, ...]:
    return torch.randn(3, 2, 8), None, torch.randn(4, 8), torch.tensor([1, 2, 3])


def test_its_names_and_its_source_are_those_of_its_definition(op: Callable[..., None]) -> None:
    assert op.__module__ == f"ropool.ops.{op.__name__.rstrip('_')}"
    assert op.__qualname__ == op.__name__
    assert repr(op).startswith(f"<function {op.__name__} at ")
    assert inspect.getsource(op).startswith(f"@eager\ndef {op.__name__}(\n")
    assert Path(op.__code__.co_filename).samefile(module_of(op).__file__)
    assert op.__globals__ is vars(module_of(op))  # type: ignore[attr-defined]
    assert inspect.getmodule(op) is module_of(op)
    assert inspect.isroutine(op)


def test_its_arguments_and_their_types_are_told(op: Callable[..., None]) -> None:
    parameters = inspect.signature(op, eval_str=True).parameters
    hints = typing.get_type_hints(op)
    assert hints.pop("return") is type(None)
    assert {name: parameter.annotation for name, parameter in parameters.items()} == hints
    assert next(iter(hints.values())) is torch.Tensor
    told = inspect.getfullargspec(op)
    assert [*told.args, *told.kwonlyargs] == list(parameters)
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    assert told.kwonlydefaults == defaults
    assert "backend" in defaults


def test_help_and_doctest_find_it(op: Callable[..., None]) -> None:
    text = pydoc.plain(pydoc.render_doc(op))
    assert f" in module {op.__module__}\n" in text
    assert f"{op.__name__}(" in text
    assert (inspect.getdoc(op) or "").splitlines()[0] in text
    assert f"{op.__name__}(" in pydoc.plain(pydoc.render_doc(module_of(op)))
    finder = doctest.DocTestFinder(exclude_empty=False)
    assert f"{op.__module__}.{op.__name__}" in {test.name for test in finder.find(module_of(op))}


def test_it_is_pickled_and_copied_by_name(op: Callable[..., None]) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(op, protocol)) is op
    assert copy.copy(op) is op
    assert copy.deepcopy([op]) == [op]


def test_it_can_be_wrapped(op: Callable[..., None]) -> None:
    @functools.wraps(op)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)

    assert wrapper.__name__ == op.__name__
    assert wrapper.__doc__ == op.__doc__
    assert inspect.signature(wrapper) == inspect.signature(op)
    partial = functools.partial(op, backend="reference")
    assert inspect.signature(partial).parameters["backend"].default == "reference"


def test_in_a_class_it_is_a_method_unless_it_is_static() -> None:
    class Layer:
        method = ropool.rope_
        static = staticmethod(ropool.rope_)

    assert Layer.method is Layer.static is Layer().static is ropool.rope_
    layer = Layer()
    assert inspect.ismethod(layer.method)
    assert layer.method.__self__ is layer
    q, *rest = rope_arguments()
    for _ in range(2):
        layer.static(q, *rest)
        with pytest.raises(TypeError, match=r"ropool.rope_: q must be a torch.Tensor, got Layer"):
            layer.method(None, *rest[1:])  # type: ignore[call-arg, arg-type]


def test_it_is_compiled_itself() -> None:
    """Also after a call that compiled code remembers, which has no frame of Python to look into."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph

    q, *rest = rope_arguments()
    want = q.clone()
    for _ in range(2):
        ropool.rope_(want, *rest)
    torch._dynamo.reset()
    run = torch.compile(ropool.rope_, backend=backend, fullgraph=True)
    for _ in range(2):
        run(q, *rest)
    assert len(graphs) == 1
    torch.testing.assert_close(q, want, rtol=0, atol=0)
