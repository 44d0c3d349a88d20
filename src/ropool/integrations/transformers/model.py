"""A causal language model of `transformers`, run over ropool's pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ropool.engine.spec import ModelSpec
from ropool.engine.step import Step
from ropool.errors import RopoolError
from ropool.integrations.transformers.attention import PooledAttention
from ropool.rotary import RotaryConfig, RotaryEmbedding, length_range

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The `model_type`s whose decoder layers are known to have the shape that `PooledModel` runs."""


def require_covered(family: str) -> None:
    """Raise `RopoolError` for a model family that is not covered."""
    if family not in FAMILIES:
        raise RopoolError(f"model family {family!r} is not covered; covered: {', '.join(FAMILIES)}")


class PooledModel:
    """Runs a loaded `...ForCausalLM`. Its attention modules are replaced, so the model can no
    longer be called itself.

    Embedding, decoder layers, norms and head are the model's own modules; only the loop over the
    layers is done here, since the library's would also compute cos/sin tables and masks that
    nothing reads.

    Raises `RopoolError` for a family that is not covered, or a rotation that ropool cannot express.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        require_covered(config.model_type)
        try:
            rotary_config = RotaryConfig.from_hf(config)
        except ValueError as error:
            raise RopoolError(str(error)) from error
        # LongRoPE and dynamic NTK change their frequencies with the length, which requests of one
        # batch do not share: the context is then the part before the first change.
        last = length_range(rotary_config, 1)[1]
        context: int = config.max_position_embeddings
        context = context if last is None else min(context, last)
        self._embed = model.get_input_embeddings()
        self._layers = model.model.layers[: config.num_hidden_layers]
        self._norm = model.model.norm
        self._head = model.get_output_embeddings()
        weight = self._embed.weight
        rotary = RotaryEmbedding(rotary_config, context, device=weight.device)
        windows = []
        for number, layer in enumerate(self._layers):
            original = layer.self_attn
            windows.append(_window(config, original))
            layer.self_attn = PooledAttention(original, number, rotary)
        self.spec = ModelSpec(
            heads_kv=config.num_key_value_heads,
            head_dim=original.head_dim,
            windows=tuple(windows),
            max_position=context,
            eos_ids=_eos_ids(model),
            vocabulary=weight.shape[0],
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """See `ropool.engine.model.CausalModel`."""
        hidden = self._embed(step.tokens)
        for layer in self._layers:
            hidden = layer(hidden, step=step)
        return self._head(self._norm(hidden[step.sample_rows])).float()


def _window(config: Any, attention: nn.Module) -> int | None:
    """The sliding window of a layer: the Qwen families keep it in the layer, Mistral in the config
    for all layers."""
    window: int | None = getattr(attention, "sliding_window", None)
    if config.model_type == "mistral":
        window = getattr(config, "sliding_window", None)
    return window


def _eos_ids(model: Any) -> frozenset[int]:
    """End-of-text tokens; the generation config goes first, as in the library's own `generate`."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
