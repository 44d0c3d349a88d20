"""What has to be known of a model family: where its parts are, and which attention stands in for
its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import AutoModelForCausalLM

from ropool.engine.spec import KVRow, LatentRow
from ropool.rotary import StackedRotary


class PoolAttention(Protocol):
    """An attention module over the pool, called by a decoder layer of the library.

    Its `forward` takes `hidden_states` `[1, T, hidden]` and, by name, `step`, the `Step` that
    `PooledModel` gives each decoder layer and that the layer passes on; everything else that the
    layer passes is of no use to it. It returns the result and `None`.
    """

    @property
    def row(self) -> KVRow | LatentRow:
        """What a token's row in the pool of this layer is."""
        ...

    window: int | None
    """Tokens that the sliding window holds, the query's own included; `None`: all."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How models of a family are taken apart. The functions get the objects of the library."""

    attention: Callable[[Any, int, StackedRotary], PoolAttention]
    """The module that replaces an attention module, from that module, the number of its layer, and
    the rotation of that layer."""
    decoder: Callable[[Any], Any] = lambda model: model.model
    """The module with `layers` and the last norm."""
    auto_class: Any = AutoModelForCausalLM
    """What loads a model by its directory or name."""
    attention_name: str = "self_attn"
    """Where a layer has its attention."""
    norm_name: str = "norm"
    """Where the decoder has its last norm."""
    head: Callable[[Any], Callable[[Tensor], Tensor]] = lambda model: model.get_output_embeddings()
    """What makes logits `[N, vocab]` of normalised rows `[N, hidden]`."""
    takes_embeddings: bool = True
    """See `ModelSpec`."""
