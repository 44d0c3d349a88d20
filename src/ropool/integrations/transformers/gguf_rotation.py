"""What a GGUF file says of the rotation and the library does not read: such a model would run with
other frequencies than it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ropool.errors import RopoolError
from ropool.integrations.transformers.rotation import read_configs

_SCALED_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def check_rotation(path: Path, config: Any) -> None:
    """Raise `RopoolError` when the file has frequencies, a scaling, a base or a rotary width that
    `config`, as the library made it of the file, does not have."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    lost = [tensor.name for tensor in reader.tensors if tensor.name.startswith(_SCALED_TENSORS)]
    fields = {
        name.partition(".rope.")[2]: (name, field.contents())
        for name, field in reader.fields.items()
        if ".rope." in name
    }
    rotations = read_configs(config)
    for key, known in (
        ("scaling.type", {"none"}),
        ("scaling.factor", {0.0, 1.0}),
        ("scaling.attn_factor", {1.0}),
        ("freq_base", {rotation.theta for rotation in rotations}),
        ("freq_base_swa", {rotation.theta for rotation in rotations}),
        ("dimension_count", {rotation.rotary_dim for rotation in rotations}),
    ):
        if key in fields and fields[key][1] not in known:
            lost.append("{} = {}".format(*fields[key]))
    if lost:
        raise RopoolError(
            f"cannot read {path}: its rotation ({', '.join(sorted(lost))}) is lost when the "
            "library reads the file; load the model from safetensors"
        )
