"""The engine over MLX: requests, scheduler and sampling are those of the PyTorch engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ropool.engine.cache import KVCache
from ropool.engine.engine import Engine
from ropool.engine.spec import ModelSpec
from ropool.engine.step import Span
from ropool.errors import RopoolError
from ropool.mlx.context import build_context
from ropool.mlx.model import MlxModel
from ropool.mlx.pool import MlxKVCache


class MlxEngine(Engine):
    """Generates text with a model of `mlx-lm`; see `Engine`. The pool holds the model's dtype: any
    other `cache_dtype`, and `cache_scales`, raise `RopoolError`."""

    model: MlxModel  # type: ignore[assignment]
    cache: MlxKVCache

    def _new_cache(self, spec: ModelSpec, **sizes: Any) -> KVCache:
        dtype = sizes["dtype"]
        if dtype not in (None, spec.dtype):
            raise RopoolError(
                f"cache_dtype is {dtype}; allowed with the MLX engine: None or {spec.dtype}, the "
                "model's dtype"
            )
        return MlxKVCache(spec, mlx_dtype=self.model.dtype, **sizes)

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        kernels = self.model.kernels_for(sum(len(span.tokens) for span in spans))
        logits = self.model.forward(build_context(spans, self.cache, kernels))
        return torch.from_numpy(np.array(logits))
