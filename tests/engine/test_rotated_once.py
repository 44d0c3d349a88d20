"""A layer that rotates and stores the keys of one step twice is found with checks on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import tiny
from ropool.dispatch.settings import override
from ropool.engine import Engine, SamplingParams
from ropool.integrations.transformers import PooledModel


class Twice(nn.Module):
    """Attention that is called a second time, as by a model which rotates by itself too."""

    def __init__(self, once: nn.Module) -> None:
        super().__init__()
        self.once = once

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        self.once(hidden_states, **options)
        result: tuple[Tensor, None] = self.once(hidden_states, **options)
        return result


@pytest.mark.parametrize("twice", [False, True])
def test_rotated_once(twice: bool) -> None:
    original = tiny.build("llama")
    engine = Engine(PooledModel(original), pool_tokens=64)
    if twice:
        layer = original.model.layers[1]
        layer.self_attn = Twice(layer.self_attn)
    with override(check=True), torch.inference_mode():
        if twice:
            with pytest.raises(RuntimeError, match="layer 1 has called rope_store_kv_ on its K"):
                engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=3))
        else:
            engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=3))
