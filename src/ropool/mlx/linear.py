"""Projections laid out as the product reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


class RowLinear(nn.Module):
    """A linear layer whose weight stands as `[in, out]`, which the BLAS of MLX's CPU build reads
    faster than the `[out, in]` of `nn.Linear`."""

    def __init__(self, weight: mx.array, bias: mx.array | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        if self.bias is None:
            return x @ self.weight
        return mx.addmm(self.bias, x, self.weight)


def as_rows(linear: nn.Linear) -> RowLinear:
    """The same layer with its weight turned round."""
    return RowLinear(mx.contiguous(linear.weight.T), linear.bias if "bias" in linear else None)


def use_rows(model: Any) -> None:
    """Turn every plain linear layer of a model round; quantised ones stay."""

    def turn(module: Any) -> Any:
        return as_rows(module) if type(module) is nn.Linear else module

    model.update_modules(tree_map(turn, model.leaf_modules(), is_leaf=nn.Module.is_module))
    mx.eval(model.parameters())


def packed(projections: Sequence[Any]) -> Any | None:
    """One projection that computes the outputs of all, side by side; `None` when they are not plain
    linear layers, such as quantised ones."""
    if any(type(projection) is not nn.Linear for projection in projections):
        return None
    first = projections[0]
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = mx.concatenate([projection.weight for projection in projections])
    if "bias" in first:
        linear.bias = mx.concatenate([projection.bias for projection in projections])
    return linear
