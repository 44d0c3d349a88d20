"""A causal language model of `transformers`, run over ropool's pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ropool.engine.scales import CacheScales
from ropool.engine.spec import ModelSpec
from ropool.engine.step import Step
from ropool.errors import RopoolError
from ropool.integrations.transformers.families import family_of
from ropool.integrations.transformers.linear import reordered
from ropool.integrations.transformers.rotation import allocate


class PooledModel:
    """Runs a loaded `...ForCausalLM`. Its attention modules are replaced, so the model can no
    longer be called itself.

    `original` is that model, for what stands beside its language model, such as a vision part; it
    is put in evaluation mode. `read_scales` finds the scales of an fp8 pool in the model's files.
    Embedding, decoder layers, norms and head are the model's own modules; only the loop over the
    layers is done here, since the library's would also compute cos/sin tables and masks that
    nothing reads.

    Raises `RopoolError` for a family that is not covered, or a rotation that ropool cannot express.
    """

    def __init__(self, model: Any) -> None:
        self.original = model.eval()
        self.read_scales: Callable[[], CacheScales | None] = lambda: None
        family = family_of(model.config.model_type)
        config = model.config.get_text_config(decoder=True)
        decoder = family.decoder(model)
        self._embed = model.get_input_embeddings()
        self._layers = decoder.layers[: config.num_hidden_layers]
        self._norm = getattr(decoder, family.norm_name)
        self._head = reordered(family.head(model))
        weight = self._embed.weight
        rotations = allocate(config, decoder.rotary_emb, weight.device)
        context: int = config.max_position_embeddings
        attentions = []
        for number, layer in enumerate(self._layers):
            original = getattr(layer, family.attention_name)
            attentions.append(family.attention(original, number, rotations.layers[number]))
            setattr(layer, family.attention_name, attentions[-1])
            reordered(layer)
        self.spec = ModelSpec(
            row=attentions[0].row,
            windows=tuple(_window(attention.window, context) for attention in attentions),
            max_position=context,
            rotary_switch=rotations.switch,
            position_streams=rotations.streams,
            hidden_size=weight.shape[1],
            takes_embeddings=family.takes_embeddings,
            eos_ids=_eos_ids(model),
            vocabulary=weight.shape[0],
            dtype=weight.dtype,
            device=weight.device,
        )

    @cached_property
    def cache_scales(self) -> CacheScales | None:
        """Of an fp8 pool, and read only when there is one: other pools have no use for them."""
        return self.read_scales()

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """See `ropool.engine.model.CausalModel`."""
        # The library's layers know batches only, and some of its MoE blocks insist.
        hidden = self._embed(step.tokens[None])
        for first, rows in step.embeddings:
            hidden[0, first : first + len(rows)] = rows
        for layer in self._layers:
            hidden = layer(hidden, step=step)
        return self._head(self._norm(hidden[0, step.sample_rows])).float()


def _window(window: int | None, context: int) -> int | None:
    """One that holds the whole context is none: such layers need no pool of their own."""
    if window is not None and window < 1:
        raise RopoolError(f"sliding_window is {window}; allowed: None or at least 1")
    return None if window is None or window >= context else window


def _eos_ids(model: Any) -> frozenset[int]:
    """End-of-text tokens; the generation config goes first, as in the library's own `generate`."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
