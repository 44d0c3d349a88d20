"""Reordered weights give the products of `nn.Linear`, for any number of rows."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn

from engine import tiny
from ropool.integrations.transformers import PooledModel
from ropool.integrations.transformers.linear import ReorderedLinear, reordered

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="weights are reordered for oneDNN on x86 only",
)

IN, OUT = 72, 40


def build(dtype: torch.dtype, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.normal_()
    return linear.to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 65])
def test_products_are_those_of_float64(rows: int, bias: bool) -> None:
    linear = build(torch.float32, bias)
    x = torch.randn(1, rows, 2 * IN)[..., 5 : 5 + IN]  # a strided view
    with torch.inference_mode():
        got = reordered(linear)(x)
    torch.testing.assert_close(got, linear.double()(x.double()).float(), rtol=1e-5, atol=3e-5)


def test_bfloat16_rounds_once() -> None:
    linear = build(torch.bfloat16, bias=True)
    module = reordered(linear)
    if module is linear:
        pytest.skip("oneDNN has no bfloat16 products on this processor")
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    with torch.inference_mode():
        got = module(x)
    exact = linear.double()(x.double())
    # Half a unit in the last place of 8 bits, and a little for sums in float32.
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_weights_can_still_be_read() -> None:
    linear = build(torch.float32, bias=False)
    assert torch.equal(reordered(linear).weight, linear.weight)


def test_every_linear_of_a_layer_is_replaced_and_nothing_else() -> None:
    class Special(nn.Linear):
        """Computes something of its own."""

    module = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), nn.SiLU()), "b": Special(8, 8)})
    special = module["b"]
    assert reordered(module) is module
    assert isinstance(module["a"][0], ReorderedLinear) and module["b"] is special
    meta = nn.Linear(8, 8, device="meta")
    assert reordered(meta) is meta


def test_a_model_keeps_no_other_linear() -> None:
    model = tiny.build("llama")
    PooledModel(model)
    kinds = [type(module) for module in model.model.layers.modules()]
    assert nn.Linear not in kinds and kinds.count(ReorderedLinear) == 3 * 5
