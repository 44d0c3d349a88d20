"""A model of `mlx-lm`, run over ropool's pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import torch

from ropool.engine.cache import PAGE_SIZE
from ropool.engine.spec import KVRow, ModelSpec
from ropool.errors import RopoolError
from ropool.mlx.aot import MlxAOTKernelBuildInputs, MlxAOTKernelContext, registry
from ropool.mlx.attention import PooledAttention, head_dim_of
from ropool.mlx.context import BatchedDecodeContext, LayerContext
from ropool.mlx.linear import RowLinear, use_rows
from ropool.mlx.policy import current_device
from ropool.mlx.rotation import read_rotation

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
"""The `model_type`s whose attention modules are known to have the shape that is run here."""

TORCH_DTYPES = {
    mx.float32: torch.float32,
    mx.float16: torch.float16,
    mx.bfloat16: torch.bfloat16,
}


def require_covered(family: str) -> None:
    """Raise `RopoolError` for a model family that is not covered."""
    if family not in FAMILIES:
        raise RopoolError(
            f"model family {family!r} is not covered by the MLX engine; covered: "
            f"{', '.join(FAMILIES)}"
        )


class MlxModel:
    """Runs a loaded model. Its attention modules are replaced, so it can no longer be called
    itself.

    `windows` are the sliding windows of the layers, by default those of `mlx-lm`, which has none
    for some families that have them. Raises `RopoolError` for a family that is not covered, for
    windows that `mlx-lm` has differently, and for `ROPOOL_MLX_CUSTOM_ROPE=1` where the kernels
    cannot be used.
    """

    def __init__(
        self,
        model: Any,
        eos_ids: frozenset[int],
        windows: Sequence[int | None] | None = None,
    ) -> None:
        args = model.args
        require_covered(args.model_type)
        self._model = model
        layers = model.layers
        sample = layers[0].self_attn
        embedding = model.model.embed_tokens
        # A quantised embedding stores integers; the norm behind it has the model's dtype.
        self.dtype: mx.Dtype = layers[0].input_layernorm.weight.dtype
        head_dim = head_dim_of(sample)
        context = int(args.max_position_embeddings or 4096)
        device = current_device()
        rotations = [
            read_rotation(layer.self_attn.rope, context, table=device.name == "cpu")
            for layer in layers
        ]
        self.inputs = MlxAOTKernelBuildInputs(
            attention=sample,
            heads_q=sample.n_heads,
            heads_kv=sample.n_kv_heads,
            head_dim=head_dim,
            dtype=str(TORCH_DTYPES[self.dtype]).removeprefix("torch."),
            page_size=PAGE_SIZE,
            # One layer whose rotation the kernel does not know leaves all of them to the model.
            rotation=next((one for one in rotations if one.arguments is None), rotations[0]),
            device=device,
        )
        self.kernels = registry.build_kernel_set(self.inputs)
        spec_windows = _windows(model, windows, context)
        self._layers = [LayerContext(number) for number in range(len(layers))]
        for layer, rotation in zip(layers, rotations, strict=True):
            layer.self_attn = PooledAttention(layer.self_attn, rotation)
        self._head = model.lm_head if "lm_head" in model else model.model.embed_tokens.as_linear
        if device.name == "cpu":
            use_rows(model)
            if "lm_head" in model:
                self._head = model.lm_head
            elif type(embedding) is nn.Embedding:  # a second copy, for speed
                self._head = RowLinear(mx.contiguous(embedding.weight.T), None)
        self.spec = ModelSpec(
            row=KVRow(sample.n_kv_heads, head_dim),
            windows=spec_windows,
            max_position=context,
            rotary_switch=None,
            position_streams=1,
            hidden_size=args.hidden_size,
            eos_ids=eos_ids,
            vocabulary=embedding.weight.shape[0],
            dtype=TORCH_DTYPES[self.dtype],
            device=torch.device("cpu"),
        )

    def kernels_for(self, tokens: int) -> MlxAOTKernelContext:
        """The kernels of a step with so many tokens."""
        return MlxAOTKernelContext.for_step(self.kernels, tokens)

    def forward(self, step: BatchedDecodeContext) -> mx.array:
        """Write K and V of the step's tokens into the pools; return the logits, `[N, vocab]`
        float32, that follow the tokens `step.sample_rows`. Evaluates both."""
        for layer in self._layers:
            layer.step = step
        hidden = self._model.model(step.tokens, cache=self._layers)[0]
        logits = self._head(hidden[step.sample_rows]).astype(mx.float32)
        pools = [step.cache.mlx_pool(kind) for kind in step.cache.pools]
        mx.eval(logits, [(pool.k, pool.v) for pool in pools])
        return logits


def _windows(
    model: Any, given: Sequence[int | None] | None, context: int
) -> tuple[int | None, ...]:
    """The sliding window of each layer; one that holds the whole context is none."""
    own = [_window(model, layer) for layer in model.layers]
    # Layers with a window may rotate by another base, so it is not enough to correct the window.
    if given is not None and any(own) and list(given) != own:
        raise RopoolError(
            f"the layers have windows {list(given)} by the model's config, {own} in mlx-lm, which "
            "reads sliding_window_pattern: the MLX engine cannot run it; engine torch does"
        )
    windows = own if given is None else given
    for window in windows:
        if window is not None and window < 1:
            raise RopoolError(f"sliding_window is {window}; allowed: None or at least 1")
    return tuple(None if window is None or window >= context else window for window in windows)


def _window(model: Any, layer: Any) -> int | None:
    """The sliding window of a layer, where `mlx-lm` gives it one."""
    sliding = getattr(layer, "use_sliding", False) or getattr(layer.self_attn, "is_sliding", False)
    return int(model.args.sliding_window) if sliding else None
