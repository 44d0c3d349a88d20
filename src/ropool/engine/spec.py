"""The facts of a model that size its KV cache and bound its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class KVRow(NamedTuple):
    """A token's row in the pool of a layer: its K and V heads."""

    heads: int
    head_dim: int


class LatentRow(NamedTuple):
    """A token's row in the pool of a layer of multi-head latent attention (MLA): the latent of
    which K and V of every head are made, and the rotated part of K, which all heads share."""

    latent_dim: int
    rope_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """What the engine knows of a model before it runs; read from the config by an integration."""

    row: KVRow | LatentRow
    """What every layer keeps of a token."""
    windows: tuple[int | None, ...]
    """For each layer the tokens that its sliding window holds, the query's own included; `None`:
    all."""
    max_position: int
    """Tokens of the context: prompt and answer together."""
    rotary_switch: int | None
    """The length beyond which all tokens of a request rotate by other frequencies (LongRoPE). In
    the table those stand below this many rows of the others."""
    position_streams: int
    """3 for M-RoPE, whose tokens have a temporal, a height and a width position; otherwise 1."""
    hidden_size: int
    """Width of an embedding."""
    eos_ids: frozenset[int]
    vocabulary: int
    """Token ids are below this."""
    dtype: torch.dtype
    device: torch.device
    takes_embeddings: bool = True
    """Whether a prompt may bring embeddings of its own. Not where the model shows a token later
    ones of its image, which attention over the pool does not."""
