"""Gemma 3's language model: norms that multiply by `1 + weight`, and logits that may be capped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def _head(model: Any) -> Callable[[Tensor], Tensor]:
    project: Callable[[Tensor], Tensor] = model.get_output_embeddings()
    cap: float | None = model.config.get_text_config().final_logit_softcapping
    if cap is None:
        return project
    return lambda rows: torch.tanh(project(rows) / cap) * cap


GEMMA3 = Family(attention=_attention, head=_head)
