"""GGUF files: read and dequantised once, then kept as safetensors in the user's cache directory.

Reading one takes the library many seconds, since it unpacks every weight and token in Python.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ropool.errors import RopoolError
from ropool.integrations.transformers.families import family_of
from ropool.integrations.transformers.gguf_rotation import check_rotation

_FORMAT = 1
"""Raised when what is written changes, so that older conversions are not read."""

_MODEL_TYPES = {"gemma3": "gemma3_text", "gpt-oss": "gpt_oss", "qwen3moe": "qwen3_moe"}
"""Families that GGUF calls otherwise."""


def converted(path: Path, report: Callable[[str], None]) -> Path:
    """The directory that holds `path` as float32 safetensors with config and tokenizer, made at the
    first call.

    Another process that converts the same file is waited for. A conversion that was cut short
    leaves nothing that a later one would read. `report` is told before a conversion starts. Raises
    `RopoolError` when the file is no GGUF, is truncated, or holds a model of a family that is not
    covered.
    """
    directory = _cache_directory() / f"{path.stem}-{_identity(path)}"
    if directory.is_dir():
        return directory
    if (family := _architecture(path)) is not None:
        family_of(_MODEL_TYPES.get(family, family))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(directory.name + ".lock")):
        if directory.is_dir():
            return directory
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        report(f"converting {path.name} to safetensors in {directory} (once, about half a minute)")
        try:
            with _parsed_once():
                _convert(path, partial)
            os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return directory


def _convert(path: Path, target: Path) -> None:
    from transformers import GgufConfig  # not in every release that directories load with

    bars = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # whatever a reader trips over in a broken file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RopoolError(f"cannot read {path}: broken or truncated GGUF ({reason})") from error
    finally:
        if not bars:
            logging.disable_progress_bar()
    family_of(model.config.model_type)
    check_rotation(path, model.config)
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as error:  # a full disk comes as an error of the safetensors package
        reason = str(error).strip().partition("\n")[0]
        raise RopoolError(f"cannot write the converted model to {target}: {reason}") from error


_parsing = threading.Lock()


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within it a file is parsed at most once, and the names of a family's tensors are put together
    once. The library would do the first for the config, the weights and the tokenizer each, the
    second for every module, and take three times as long."""
    if find_spec("gguf") is None:
        yield  # the library says so
        return
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    parsed = functools.cache(reader)

    def parse(path: str | os.PathLike[str], *mode: str) -> Any:
        return parsed(os.fspath(path), *mode)

    with _parsing:
        gguf.GGUFReader, gguf.get_tensor_name_map = parse, functools.cache(names)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def _architecture(path: Path) -> str | None:
    """The model family in the header, when it stands first as usual: the library reads the whole
    file for it."""
    key = b"general.architecture"
    with path.open("rb") as file:
        head = file.read(256)
    if head[:4] != b"GGUF":
        raise RopoolError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
    # Magic, version and two counts; length and text of the first key; type 8 (string), length,
    # text.
    start = 24 + 8 + len(key) + 4 + 8
    if len(head) < start or head[32 : 32 + len(key)] != key:
        return None
    length = int.from_bytes(head[start - 8 : start], "little")
    return head[start : start + length].decode(errors="replace")


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ropool" / "models"


def _identity(path: Path) -> str:
    """Changes with the file, and with what converts it. The content is not read: it may be many
    GiB."""
    status = path.stat()
    parts = (path.resolve(), status.st_size, status.st_mtime_ns, transformers.__version__, _FORMAT)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, or the process dies
        yield
