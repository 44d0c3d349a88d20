"""Linear layers whose weights are laid out as oneDNN reads them.

`nn.Linear` gives float32 products on x86 to the BLAS that PyTorch was built with, which for the few
rows of a decode step can read weights at a fraction of the memory's bandwidth. oneDNN, which is in
PyTorch too, is reached by the operators that PyTorch's own compiler uses for frozen weights.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 16
"""Rows that oneDNN chooses the layout for. It serves any number as well."""


def reordered(module: Callable[..., Any]) -> Any:
    """`module`, with every `nn.Linear` in it (or itself) replaced whose weights can be reordered.

    The replaced ones are freed when nothing else holds them; weights that are tied to an embedding
    are there twice from then on.
    """
    if type(module) is nn.Linear and _can_reorder(module.weight):
        return ReorderedLinear(module)
    if isinstance(module, nn.Module):
        for name, child in module.named_children():
            setattr(module, name, reordered(child))
    return module


class ReorderedLinear(nn.Module):
    """`x @ weight.T + bias` as `linear` computes it, without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # Neither parameter nor buffer: little of PyTorch works on a tensor in oneDNN's layout.
        self._reordered = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    @property
    def weight(self) -> Tensor:
        """A copy of the weights in the usual layout, `[out, in]`, for modules that multiply by
        another's weights themselves."""
        return self._reordered.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` in the dtype of the weights; returns `[..., out]`."""
        return torch.ops.mkldnn._linear_pointwise(x, self._reordered, self.bias, "none", [], "")


def _can_reorder(weight: Tensor) -> bool:
    # On other processors the two were not compared.
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(operators._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
