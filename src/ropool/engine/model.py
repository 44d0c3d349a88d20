"""What the engine calls: a model and a tokenizer, whichever library they come from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ropool.engine.scales import CacheScales
from ropool.engine.spec import ModelSpec
from ropool.engine.step import Step


class CausalModel(Protocol):
    """A language model whose attention writes to, and reads from, the pools of a `Step`."""

    spec: ModelSpec

    @property
    def cache_scales(self) -> CacheScales | None:
        """Of an fp8 pool, where the model's files have them. Raises `RopoolError` when those are
        none."""
        ...

    def forward(self, step: Step) -> Tensor:
        """Write K and V of the step's tokens into the pools; return the logits, `[N, vocab]`
        float32, that follow the tokens `step.sample_rows`."""
        ...


class Tokenizer(Protocol):
    """The part of a tokenizer that streaming needs."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...
