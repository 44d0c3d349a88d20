"""The scales of an fp8 KV pool that quantisation tools leave beside a model's weights.

`compressed-tensors` and others calibrate a model and store `...self_attn.k_scale` and
`...self_attn.v_scale` for each layer, by which K and V are divided. The library itself leaves them
unread.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from ropool.engine.scales import CacheScales, scale_names
from ropool.engine.spec import KVRow, ModelSpec
from ropool.errors import RopoolError

_NAME = re.compile(r"\blayers\.(\d+)\.self_attn\.(?:attn\.)?([kv]_scale)$")


def scales_in_files(source: str | Path, spec: ModelSpec) -> CacheScales | None:
    """The scales of the model in a directory, or with this id on the hub and loaded; `None` where
    there are none.

    Raises `RopoolError` when a layer has none while others have, or has one that is no scale.
    """
    if not isinstance(spec.row, KVRow):
        return None
    directory = Path(source)
    if not directory.is_dir():
        directory = Path(cached_file(source, "config.json")).parent
    found: dict[str, dict[int, Tensor]] = {name: {} for name in scale_names(spec)}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dictionary
                if match := _NAME.search(key):
                    value = file.get_tensor(key).float().flatten()
                    found[match[2]][int(match[1])] = value
    if not any(found.values()):
        return None
    scales = CacheScales(tuple(_stacked(name, layers, spec) for name, layers in found.items()))
    scales.check(spec)
    return scales


def _stacked(name: str, layers: dict[int, Tensor], spec: ModelSpec) -> Tensor:
    """`[layers]`, or `[layers, Hk]` where one is kept for each head."""
    for layer in range(len(spec.windows)):
        if layer not in layers:
            raise RopoolError(
                f"the model's files have {name} of some layers, none of layer {layer}"
            )
    rows = [layers[layer] for layer in range(len(spec.windows))]
    shapes = {len(row) for row in rows}
    if len(shapes) > 1:
        raise RopoolError(f"the model's files have {name} of different sizes: {sorted(shapes)}")
    stacked = torch.stack(rows)
    return stacked[:, 0] if shapes == {1} else stacked
