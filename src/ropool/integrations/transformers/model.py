"""A causal language model of `transformers`, run over ropool's pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ropool.engine.spec import ModelSpec
from ropool.engine.step import Step
from ropool.errors import RopoolError
from ropool.integrations.transformers.families import family_of
from ropool.integrations.transformers.linear import reordered
from ropool.rotary import RotaryConfig, StackedRotary


class PooledModel:
    """Runs a loaded `...ForCausalLM`. Its attention modules are replaced, so the model can no
    longer be called itself.

    Embedding, decoder layers, norms and head are the model's own modules; only the loop over the
    layers is done here, since the library's would also compute cos/sin tables and masks that
    nothing reads.

    Raises `RopoolError` for a family that is not covered, or a rotation that ropool cannot express.
    """

    def __init__(self, model: Any) -> None:
        family = family_of(model.config.model_type)
        config = model.config.get_text_config(decoder=True)
        decoder = family.decoder(model)
        self._embed = model.get_input_embeddings()
        self._layers = decoder.layers[: config.num_hidden_layers]
        self._norm = getattr(decoder, family.norm_name)
        self._head = reordered(family.head(model))
        weight = self._embed.weight
        rotations = _rotations(config)
        context: int = config.max_position_embeddings
        tables = {
            rotation: StackedRotary(rotation, context, device=weight.device)
            for rotation in set(rotations)
        }
        switches = {table.switch for table in tables.values()}
        if len(switches) > 1:
            raise RopoolError(
                f"the rotations of the model's layers change at different lengths, {switches}; "
                "one is covered"
            )
        streams = {3 if rotation.mrope_section else 1 for rotation in rotations}
        if len(streams) > 1 or (streams == {3} and switches != {None}):
            raise RopoolError("M-RoPE is covered in all layers alike and without LongRoPE only")
        attentions = []
        for number, layer in enumerate(self._layers):
            original = getattr(layer, family.attention_name)
            attentions.append(family.attention(original, number, tables[rotations[number]]))
            setattr(layer, family.attention_name, attentions[-1])
            reordered(layer)
        self.spec = ModelSpec(
            row=attentions[0].row,
            windows=tuple(attention.window for attention in attentions),
            max_position=context,
            rotary_switch=switches.pop(),
            position_streams=streams.pop(),
            hidden_size=weight.shape[1],
            eos_ids=_eos_ids(model),
            vocabulary=weight.shape[0],
            dtype=weight.dtype,
            device=weight.device,
        )

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


def _rotations(config: Any) -> list[RotaryConfig]:
    """The rotation of each layer; they may differ by the kind of layer."""
    layers: int = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [None] * layers
    try:
        by_kind = {kind: RotaryConfig.from_hf(config, kind) for kind in set(kinds)}
    except ValueError as error:
        raise RopoolError(str(error)) from error
    return [by_kind[kind] for kind in kinds[:layers]]


def _eos_ids(model: Any) -> frozenset[int]:
    """End-of-text tokens; the generation config goes first, as in the library's own `generate`."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
