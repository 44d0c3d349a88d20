"""Gemma 3's language model, alone or with the vision model beside it: norms that multiply by
`1 + weight`, and logits that may be capped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ropool.errors import RopoolError
from ropool.integrations.transformers.attention import PooledAttention, separate_projections
from ropool.integrations.transformers.families.family import Family
from ropool.rotary import StackedRotary


def _attention(original: Any, layer: int, rotary: StackedRotary) -> PooledAttention:
    config = original.config
    if config.use_bidirectional_attention:
        raise RopoolError(
            "use_bidirectional_attention is True; allowed: False, as the pool holds no later tokens"
        )
    if config.attn_logit_softcapping is not None:
        raise RopoolError(
            f"attn_logit_softcapping is {config.attn_logit_softcapping}; allowed: None, as the "
            "engine's attention caps no scores"
        )
    parts = separate_projections(original, original.sliding_window, _norm)
    return PooledAttention(parts, layer, rotary)


def _norm(norm: Any) -> tuple[Tensor, float]:
    # In float32: near 1 a sum in bfloat16 would lose what the weight says.
    return 1.0 + norm.weight.detach().float(), norm.eps


class CappedHead(nn.Module):
    """Logits between `-cap` and `cap`."""

    def __init__(self, project: nn.Linear, cap: float) -> None:
        super().__init__()
        self.project = project
        self.cap = cap

    def forward(self, rows: Tensor) -> Tensor:
        """`[N, hidden]` to `[N, vocab]`."""
        return torch.tanh(self.project(rows) / self.cap) * self.cap


def _head(model: Any) -> nn.Module:
    project: nn.Linear = model.get_output_embeddings()
    cap: float | None = model.config.final_logit_softcapping
    return project if cap is None else CappedHead(project, cap)


def _head_beside_vision(model: Any) -> nn.Module:
    cap = model.config.text_config.final_logit_softcapping
    if cap is not None:
        raise RopoolError(
            f"final_logit_softcapping is {cap}; allowed: None, as transformers does not cap the "
            "logits of a Gemma 3 with a vision model"
        )
    project: nn.Linear = model.get_output_embeddings()
    return project


GEMMA3_TEXT = Family(attention=_attention, head=_head)
GEMMA3 = Family(
    attention=_attention,
    decoder=lambda model: model.model.language_model,
    head=_head_beside_vision,
    # The tokens of an image see each other in both directions.
    takes_embeddings=False,
)
