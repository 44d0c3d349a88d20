"""The facts of a model that size its KV cache and bound its requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelSpec:
    """What the engine knows of a model before it runs; read from the config by an integration."""

    heads_kv: int
    head_dim: int
    windows: tuple[int | None, ...]
    """For each layer the tokens that its sliding window holds, the query's own included; `None`:
    all."""
    max_position: int
    """Tokens of the context: prompt and answer together."""
    eos_ids: frozenset[int]
    vocabulary: int
    """Token ids are below this."""
    dtype: torch.dtype
    device: torch.device
