"""The ops as torch ops: schemas, fakes, compilation, autograd, modes that have to see a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import ropool
from ops.backend import Backend
from ops.calls import FP8, Args, Case, arguments, check_args
from ops.memory import placed
from oracle import compare, expected
from oracle.compare import tensors_of

# Per op: the tensors, then the options, in the order of the torch schema.
TENSORS = {
    "rope_": ["q", "k", "cos_sin_cache", "positions", "offsets"],
    "rope_store_kv_": [
        *["q", "k", "v", "k_pool", "v_pool", "cos_sin_cache", "positions", "slot_mapping"],
        *["offsets", "q_norm_weight", "k_norm_weight", "k_scale", "v_scale", "q_out", "q_scale"],
        "window_slot_map",
    ],
    "store_kv_": [
        *["k", "v", "k_pool", "v_pool", "slot_mapping", "k_scale", "v_scale", "window_slot_map"]
    ],
    "store_mla_": ["k_nope", "k_rope", "pool", "slot_mapping", "scale", "window_slot_map"],
    "rope_store_mla_": [
        *["q_rope", "k_nope", "k_rope", "pool", "cos_sin_cache", "positions", "slot_mapping"],
        *["offsets", "scale", "q_out", "q_scale", "window_slot_map"],
    ],
}
DEFAULTS = {
    "layout": "NHD",
    "interleaved": False,
    "mrope_interleaved": False,
    "norm_eps": 1e-6,
    "write_k": False,
}
STORES_Q = ["rope_store_kv_", "rope_store_mla_"]
OVERLOADS = [
    ("rope_", "default"),
    ("store_kv_", "default"),
    ("store_mla_", "default"),
    *[(op, o) for op in STORES_Q for o in ("default", "q_out", "write_k", "q_out_write_k")],
]


def overload_of(op: str, overload: str) -> Any:
    return getattr(getattr(torch.ops.ropool, op), overload)


def written_by(op: str, overload: str) -> set[str]:
    """The arguments that an overload writes, by the contract."""
    if op == "rope_":
        return {"q", "k"}
    written = {"pool"} if "mla" in op else {"k_pool", "v_pool"}
    query, key = ("q_rope", "k_rope") if "mla" in op else ("q", "k")
    if op in STORES_Q:
        written.add("q_out" if "q_out" in overload else query)
    if "write_k" in overload:
        written.add(key)
    return written


def case_for(op: str, overload: str, **fields: Any) -> Case:
    small = {"head_dim": 16, "latent_dim": 24, "tokens": 5, "mistakes": True}
    q_out = "model" if "q_out" in overload else None
    return Case(op=op, q_out=q_out, write_k="write_k" in overload, **{**small, **fields})


def positional(op: str, overload: str, args: Args, backend: str) -> tuple[Any, ...]:
    """The arguments in the order of the torch schema."""
    schema = overload_of(op, overload)._schema
    values = {**DEFAULTS, **args, "backend": backend}
    return tuple(values.get(argument.name) for argument in schema.arguments)


@pytest.mark.parametrize(("op", "overload"), OVERLOADS)
def test_schema(op: str, overload: str) -> None:
    """Tensors first, nothing returned, and exactly what is written is marked: K where it is
    written back, and only there."""
    schema = overload_of(op, overload)._schema
    names = [argument.name for argument in schema.arguments]
    assert names[: len(TENSORS[op])] == TENSORS[op]
    assert not schema.returns
    marked = {
        a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }
    assert marked == written_by(op, overload)


def test_there_are_no_other_overloads() -> None:
    for op in TENSORS:
        packet = getattr(torch.ops.ropool, op)
        assert set(packet.overloads()) == {o for name, o in OVERLOADS if name == op}


@pytest.mark.parametrize(("op", "overload"), OVERLOADS)
@pytest.mark.parametrize("fp8", [False, True])
def test_opcheck(op: str, overload: str, fp8: bool, backend: Backend) -> None:
    fields: dict[str, Any] = {"q_norm": "float32", "k_norm": "model"}
    # PyTorch's own check of mutation cannot compare fp8 tensors.
    utils = ["test_schema", "test_faketensor", "test_autograd_registration"][fp8:]
    if fp8:
        fields = {"pool_dtype": FP8[0], "row_format": "fp8", "k_scale": "one"}
    case = case_for(op, overload, window="int32", offset_dtype="int32", strides="packed", **fields)
    args = placed(arguments(case), backend.device)
    torch.library.opcheck(
        overload_of(op, overload),
        positional(op, overload, args, backend.name),
        test_utils=utils,
    )


@pytest.mark.parametrize("op", TENSORS)
def test_opcheck_with_dynamic_shapes(op: str, backend: Backend) -> None:
    overload = "write_k" if op in STORES_Q else "default"
    args = placed(arguments(case_for(op, overload)), backend.device)
    torch.library.opcheck(
        overload_of(op, overload),
        positional(op, overload, args, backend.name),
        test_utils=("test_aot_dispatch_dynamic",),
    )


@pytest.mark.parametrize(("op", "overload"), OVERLOADS)
def test_torch_op_does_what_the_function_does(op: str, overload: str, backend: Backend) -> None:
    args = arguments(case_for(op, overload, specials=True))
    after = placed(args, backend.device)
    overload_of(op, overload)(*positional(op, overload, after, backend.name))
    compare(args, after, expected(op, args))


# --- compilation ----------------------------------------------------------------------------------


def compiled_call(
    op: str, backend: Backend, how: str, dynamic: bool | None
) -> Callable[[Args], None]:
    function = getattr(ropool, op)

    def call(args: Args) -> None:
        function(**args, backend=backend.name)

    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, dynamic=dynamic, backend=how)


def check_compiled(call: Callable[[Args], None], op: str, args: Args, backend: Backend) -> None:
    after = placed(args, backend.device)
    call(after)
    compare(args, after, expected(op, args))


@pytest.mark.parametrize(
    ("op", "overload"), [o for o in OVERLOADS if o[1] in ("default", "q_out_write_k")]
)
def test_compiles_whole(op: str, overload: str, backend: Backend) -> None:
    call = compiled_call(op, backend, "aot_eager", dynamic=False)
    args = arguments(case_for(op, overload, strides="odd", pool_strides="kv"))
    check_compiled(call, op, args, backend)


@pytest.mark.parametrize("op", TENSORS)
def test_compiles_once_for_any_number_of_tokens(op: str, backend: Backend) -> None:
    call = compiled_call(op, backend, "aot_eager", dynamic=True)
    case = case_for(op, "default", strides="odd", mrope="sectioned" if "store_kv" in op else None)
    # These are drawn with the number of tokens; a change of theirs would be a change of the code.
    section = {"mrope_section": (4, 3, 1), "norm_eps": 1e-5} if op == "rope_store_kv_" else {}
    check_compiled(call, op, {**arguments(case), **section}, backend)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (2, 7, 11):
            args = arguments(replace(case, tokens=tokens, seed=tokens))
            check_compiled(call, op, {**args, **section}, backend)


def test_compiles_with_inductor(backend: Backend) -> None:
    """Within a graph that makes the arguments and uses what was written."""

    def block(x: torch.Tensor, pools: list[torch.Tensor], rest: list[torch.Tensor]) -> Any:
        q, k, v = (x * 2).unflatten(-1, (4, 16)).split([2, 1, 1], dim=1)
        ropool.rope_store_kv_(q, k, v, *pools, *rest, write_k=True, backend=backend.name)
        # Doubling is exact: compiled arithmetic elsewhere may round less often.
        return q * 2, k * 2, pools[0][2, 1, 0] * 2

    table = torch.stack([torch.cos(torch.arange(9.0)), torch.sin(torch.arange(9.0))], 1)
    rest = [table, torch.tensor([1, 2, 8]), torch.tensor([9, 3, -1], dtype=torch.int32)]
    rest = [tensor.to(backend.device) for tensor in rest]
    x = torch.randn(3, 64, dtype=torch.bfloat16).to(backend.device)
    torch._dynamo.reset()
    results = []
    for run in (block, torch.compile(block, fullgraph=True, dynamic=True)):
        pools = [torch.zeros(4, 4, 1, 16, dtype=x.dtype, device=x.device) for _ in range(2)]
        results.append([*run(x, pools, rest), *pools])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=0)


def test_export_sees_the_op() -> None:
    class Block(torch.nn.Module):
        def forward(self, k: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            ropool.store_kv_(k, k, pool, pool.clone(), slots, layout="slots")
            return k

    program = torch.export.export(
        Block(), (torch.zeros(3, 1, 8), torch.zeros(9, 1, 8), torch.tensor([1, 2, 3]))
    )
    assert "ropool.store_kv_" in str(program.graph)


# --- autograd and modes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "name"),
    [("rope_", "q"), ("rope_store_kv_", "v"), ("store_kv_", "k"), ("store_mla_", "k_nope")],
)
def test_inputs_that_require_grad(op: str, name: str, backend: Backend) -> None:
    """Under grad mode they raise: a write that autograd does not see is a wrong gradient."""
    case = case_for(op, "default")
    args = placed(arguments(case), backend.device)
    args[name].requires_grad_(True)
    before = {n: t.detach().clone().view(torch.uint8) for n, t in tensors_of(args).items()}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"ropool\.{op}: {name} requires grad"):
            getattr(ropool, op)(**args, backend=backend.name)
    for n, old in before.items():
        assert torch.equal(old, args[n].detach().contiguous().view(torch.uint8))
    with torch.no_grad():
        getattr(ropool, op)(**args, backend=backend.name)
    # What ran without grad mode must not let the same call run with it.
    with pytest.raises(RuntimeError, match="requires grad"):
        getattr(ropool, op)(**args, backend=backend.name)


def test_parameters_without_grad_mode(backend: Backend) -> None:
    """Norm weights and tables are parameters of a model."""
    args = arguments(case_for("rope_store_kv_", "default", q_norm="float32", k_norm="float32"))
    after = placed(args, backend.device)
    for name in ("q_norm_weight", "k_norm_weight"):
        after[name] = torch.nn.Parameter(after[name])
    with torch.no_grad():
        ropool.rope_store_kv_(**after, backend=backend.name)
    compare(
        args,
        {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in after.items()},
        expected("rope_store_kv_", args),
    )


@pytest.mark.parametrize("op", TENSORS)
def test_inference_mode(op: str, backend: Backend) -> None:
    with torch.inference_mode():
        check_args(op, arguments(case_for(op, "default")), backend)
    args = arguments(case_for(op, "default"))
    with torch.inference_mode():
        check_args(op, args, backend)


@pytest.mark.parametrize("op", TENSORS)
def test_profiler_sees_the_op(op: str, backend: Backend) -> None:
    with torch.profiler.profile() as profile:
        check_args(op, arguments(case_for(op, "default")), backend)
    assert any(event.name == f"ropool::{op}" for event in profile.events())


def test_meta_tensors_do_nothing() -> None:
    args = placed(arguments(case_for("rope_store_kv_", "default")), "cpu")
    meta: Args = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in args.items()}
    ropool.rope_store_kv_(**meta)


@pytest.mark.parametrize("way", ["compile", "torch op", "func.grad"])
def test_no_way_to_a_gradient_that_ignores_the_op(way: str) -> None:
    """There is no backward: where autograd would look at the op, it is refused."""
    table, positions = torch.randn(64, 64), torch.arange(4)

    def turned(q: torch.Tensor) -> torch.Tensor:
        q = q * 1
        if way == "torch op":
            torch.ops.ropool.rope_(q, None, table, positions, None, False, None, False, None)
        else:
            ropool.rope_(q, None, table, positions)
        return q.sum()

    q = torch.randn(4, 8, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"q requires grad, but the op has no backward"):
        if way == "func.grad":
            torch.func.grad(turned)(q.detach())
        elif way == "compile":
            torch.compile(turned, backend="aot_eager", fullgraph=True)(q)
        else:
            turned(q)
