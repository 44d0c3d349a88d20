"""`torch.compile` on a GPU, with CUDA graphs and without: a later call reads what stands in the
tensors by then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ropool
from ops.calls import Case, arguments
from ops.memory import placed
from oracle import compare, expected
from oracle.compare import tensors_of
from ropool.backends import cuda
from ropool.backends.cuda.launch import ARGUMENTS

pytestmark = pytest.mark.skipif(
    cuda.available() is not None, reason=f"backend cuda: {cuda.available()}"
)
MODES = {"without graphs": "default", "with graphs": "reduce-overhead"}
CALLS = 5
"""The first compiles and warms up, the second is recorded, the others are replayed."""


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """For exactly the shapes that it is called with."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False, mode=MODES[mode])


def graphs() -> int:
    """How many CUDA graphs compiled functions have recorded since the last reset."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else sum(map(len, manager.roots.values()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_each_call_takes_what_stands_in_the_tensors(op: str, mode: str) -> None:
    """Positions, slots and padding change in place."""
    q_out = "model" if op.startswith("rope_store") else None
    case = Case(op=op, tokens=6, mistakes=True, q_out=q_out)
    args = placed(arguments(case), "cuda")
    for tensor in tensors_of(args).values():  # as buffers are; else the graph would read a copy
        torch._dynamo.mark_static_address(tensor)

    def call(args: dict[str, Any]) -> None:
        getattr(ropool, op)(**args, backend="cuda")

    run = compiled(call, mode)
    for seed in range(CALLS):
        fresh = arguments(replace(case, seed=seed))
        for name, tensor in tensors_of(args).items():
            tensor.copy_(fresh[name])
        before = {**args, **placed(tensors_of(args), "cpu")}
        run(args)
        torch.cuda.synchronize()
        compare(before, args, expected(op, before))
    assert graphs() == (mode == "with graphs")


class Layer(torch.nn.Module):
    """From hidden states to the rotated query, as in a model: the pool and the table are buffers, Q
    and K are views of what the function computes."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(64.0)[:, None] * torch.linspace(1, 0.01, 32)
        self.register_buffer("table", torch.cat((angle.cos(), angle.sin()), dim=1))
        self.register_buffer("k_pool", torch.zeros(8, 16, 2, 64, dtype=torch.bfloat16))
        self.register_buffer("v_pool", torch.zeros(8, 16, 2, 64, dtype=torch.bfloat16))

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        q, k, v = (x * 2).unflatten(-1, (-1, 64)).split([4, 2, 2], dim=1)
        pools = self.k_pool, self.v_pool
        ropool.rope_store_kv_(q, k, v, *pools, self.table, positions, slots, backend="cuda")
        return q * 2


class LatentLayer(torch.nn.Module):
    """The same for MLA: the rope part of Q is rotated within the whole query."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(64.0)[:, None] * torch.linspace(1, 0.01, 32)
        self.register_buffer("table", torch.cat((angle.cos(), angle.sin()), dim=1))
        self.register_buffer("pool", torch.zeros(8, 16, 576, dtype=torch.bfloat16))

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        q, latent, rope = (x * 2).split([4 * 192, 512, 64], dim=1)
        q = q.unflatten(-1, (4, 192))
        index = self.table, positions, slots
        ropool.rope_store_mla_(
            q[..., 128:], latent, rope, self.pool, *index, interleaved=True, backend="cuda"
        )
        return q * 2


WIDTHS = {Layer: 8 * 64, LatentLayer: 4 * 192 + 576}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", WIDTHS)
@torch.inference_mode()
def test_a_layer_is_what_it_is_uncompiled(kind: type[torch.nn.Module], mode: str) -> None:
    """For two numbers of tokens in turn, with padding and positions that are changed in place."""
    eager, layer = kind().cuda(), kind().cuda()
    run = compiled(layer, mode)
    index = {
        tokens: [torch.zeros(tokens, dtype=torch.int64, device="cuda") for _ in range(2)]
        for tokens in (3, 7)
    }
    generator = torch.Generator().manual_seed(0)
    for _ in range(CALLS):
        for tokens, (positions, slots) in index.items():
            positions.copy_(
                torch.randint(0, 66, (tokens,), generator=generator)
            )  # the table has 64
            slots.copy_(torch.randperm(140, generator=generator)[:tokens] - 8)
            x = torch.randn(tokens, WIDTHS[kind], generator=generator).to("cuda", torch.bfloat16)
            want = eager(x, positions, slots)
            # Doubling is exact: compiled arithmetic elsewhere may round less often.
            torch.testing.assert_close(run(x, positions, slots), want, rtol=0, atol=0)
            for name, buffer in eager.named_buffers():
                assert torch.equal(dict(layer.named_buffers())[name], buffer)
    assert graphs() == (2 if mode == "with graphs" else 0)
