"""Finds a model as the PyTorch engine does, and loads it with `mlx-lm`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoTokenizer

from ropool.errors import RopoolError
from ropool.integrations.transformers.load import find
from ropool.mlx.model import MlxModel, require_covered


def load(
    name: str,
    *,
    dtype: mx.Dtype = mx.float32,
    report: Callable[[str], None] = lambda message: None,
) -> tuple[MlxModel, Any]:
    """Return the model `name` and its tokenizer; names are those of
    `ropool.integrations.transformers.load`, and a hub id is downloaded.

    Weights that are not quantised are converted to `dtype`. Raises `RopoolError` when there is no
    such model or it cannot be read.
    """
    source = find(name, report)
    try:
        folder = source if isinstance(source, Path) else _download(source)
        config = AutoConfig.from_pretrained(folder)
        require_covered(config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, _ = load_model(folder, lazy=True, model_config=rotation_fields(folder))
    except RopoolError:
        raise
    except Exception as error:  # a directory or a download can be wrong in every way
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RopoolError(f"cannot load model {name!r} with mlx-lm: {reason}") from error
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return MlxModel(model, _eos_ids(folder, config), windows_of(config)), tokenizer


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))


def rotation_fields(folder: Path) -> dict[str, Any]:
    """The rotation in the fields that `mlx-lm` reads. Newer configs name it `rope_parameters`,
    which most of its models pass over, to rotate by a base of 10000 instead."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parameters = config.get("rope_parameters")
    if not parameters:
        return {}
    fields: dict[str, Any] = {}
    if "sliding_attention" in parameters:
        fields["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    parameters = parameters.get("full_attention", parameters)
    fields["rope_theta"] = parameters["rope_theta"]
    if "partial_rotary_factor" in parameters:
        fields["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        fields["rope_scaling"] = {**parameters, "type": kind}
        original = parameters.get("original_max_position_embeddings")
        if original is not None:
            fields["original_max_position_embeddings"] = original
    return fields


def windows_of(config: Any) -> list[int | None] | None:
    """The sliding window of each layer as `transformers` has it; `None` for llama, whose windows
    are an addition of `mlx-lm`'s own."""
    if config.model_type == "llama":
        return None
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3"):
        return [window] * int(config.num_hidden_layers)
    return [window if kind == "sliding_attention" else None for kind in config.layer_types]


def _eos_ids(folder: Path, config: Any) -> frozenset[int]:
    """End-of-text tokens; the generation config goes first, as in the library's own `generate`."""
    from transformers import GenerationConfig

    ids = None
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    ids = getattr(config, "eos_token_id", None) if ids is None else ids
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
