"""`ropool.plan`: a call bound once does what the op does, on whatever its tensors hold by then."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import Case, arguments
from ops.memory import placed
from oracle import compare, expected
from oracle.compare import storage_bytes, tensors_of
from ropool.dispatch import settings

OPS = ["rope_", "rope_store_kv_", "store_kv_", "store_mla_", "rope_store_mla_"]


def case_of(op: str) -> Case:
    q_out = "model" if op.startswith("rope_store") else None
    return Case(op=op, tokens=6, mistakes=True, q_out=q_out)


@pytest.mark.parametrize("op", OPS)
def test_each_call_takes_what_stands_in_the_tensors(op: str, backend: Backend) -> None:
    args = placed(arguments(case_of(op)), backend.device)
    before = placed(args, "cpu")
    plan = ropool.plan(op, **args, backend=backend.name)
    for name, tensor in tensors_of(args).items():  # nothing has been written yet
        assert torch.equal(storage_bytes(tensor).cpu(), storage_bytes(before[name])), name
    assert plan.kernel.startswith(f"{backend.name}/")
    for seed in (3, 4):
        fresh = arguments(Case(**{**vars(case_of(op)), "seed": seed}))
        for name, tensor in tensors_of(args).items():
            tensor.copy_(fresh[name])
        before = {**args, **placed(tensors_of(args), "cpu")}
        plan()
        compare(before, args, expected(op, before))


def small() -> dict[str, Any]:
    return {
        "q": torch.randn(3, 2, 8),
        "k": None,
        "cos_sin_cache": torch.randn(16, 8),
        "positions": torch.tensor([1, 2, 3]),
    }


def test_it_keeps_its_tensors_alive_and_lets_them_go() -> None:
    args = small()
    alive = weakref.ref(args["q"])
    plan = ropool.plan("rope_", **args)
    del args
    gc.collect()
    assert alive() is not None
    plan()
    del plan
    gc.collect()
    assert alive() is None


def test_mistakes_are_told_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"ropool.plan: op is 'rope'; known: rope_, "):
        ropool.plan("rope", **small())
    with pytest.raises(ValueError, match=r"ropool.rope_: positions"):
        ropool.plan("rope_", **small() | {"positions": torch.arange(4)})
    with pytest.raises(RuntimeError, match=r"ropool.rope_: q requires grad"):
        ropool.plan("rope_", **small() | {"q": torch.randn(3, 2, 8, requires_grad=True)})
    with pytest.raises(ValueError, match=r"backend 'nowhere' is unknown"):
        ropool.plan("rope_", **small(), backend="nowhere")


def test_no_tokens_are_nothing_to_do() -> None:
    args = small() | {"q": torch.randn(0, 2, 8), "positions": torch.arange(0)}
    plan = ropool.plan("rope_", **args)
    plan()
    assert (plan.kernel, repr(plan)) == ("", "<ropool.Plan rope_ on nothing>")


def test_the_checks_in_force_when_it_was_made_stay() -> None:
    args = small()
    with settings.override(check=True):
        checked = ropool.plan("rope_", **args, backend="reference")
    unchecked = ropool.plan("rope_", **args, backend="reference")
    args["positions"][1] = 16
    unchecked()
    with pytest.raises(IndexError, match=r"ropool.rope_: token 1 has position 16"):
        checked()


def test_within_compile_it_is_the_op() -> None:
    args = small()
    want = args["q"].clone()
    ropool.rope_(want, None, args["cos_sin_cache"], args["positions"])
    plan = ropool.plan("rope_", **args)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        plan()
        return x + 1

    step(torch.zeros(2))
    torch.testing.assert_close(args["q"], want)
