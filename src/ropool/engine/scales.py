"""The scales of an fp8 pool, as values and as a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ropool.engine.spec import KVRow, ModelSpec
from ropool.errors import RopoolError


@dataclass(frozen=True, eq=False)
class CacheScales:
    """fp8 scales of every layer, float32: a stored value is `x / scale`, saturated.

    `values` are those of K and those of V, `[layers]` or `[layers, Hk]`; of an MLA model those of
    the latent rows, `[layers]`.
    """

    values: tuple[Tensor, ...]

    @classmethod
    def one(cls, spec: ModelSpec) -> CacheScales:
        """Scale 1 everywhere."""
        return cls(tuple(torch.ones(len(spec.windows)) for _ in scale_names(spec)))

    @classmethod
    def read(cls, path: Path, spec: ModelSpec) -> CacheScales:
        """From a JSON file as `write` leaves it. Raises `RopoolError` for one that is none, or is
        of another model."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            scales = cls(
                tuple(torch.tensor(data[name], dtype=torch.float32) for name in scale_names(spec))
            )
        except KeyError as error:
            raise RopoolError(f"{path} has no cache scales {error}") from error
        except OSError as error:
            raise RopoolError(f"cannot read {path}: {error.strerror}") from error
        # No JSON, no object, ragged lists, no numbers; numbers too large, lists too deep.
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise RopoolError(f"{path} has no cache scales: {error}") from error
        scales.check(spec)
        return scales

    def write(self, path: Path, spec: ModelSpec) -> None:
        """As a JSON object: `k_scale` and `v_scale`, or `row_scale` of an MLA model."""
        pairs = zip(scale_names(spec), self.values, strict=True)
        text = json.dumps({name: value.tolist() for name, value in pairs})
        path.write_text(text + "\n", encoding="utf-8")

    def check(self, spec: ModelSpec) -> None:
        """Raise `RopoolError` when these are no scales for such a model."""
        names, layers = scale_names(spec), len(spec.windows)
        allowed: list[list[int]] = [[layers]]
        if isinstance(spec.row, KVRow):
            allowed.append([layers, spec.row.heads])
        if len(self.values) != len(names):
            raise RopoolError(f"{len(self.values)} cache scales; expected {' and '.join(names)}")
        for name, value in zip(names, self.values, strict=True):
            if list(value.shape) not in allowed:
                shapes = " or ".join(map(str, allowed))
                raise RopoolError(f"{name} is {list(value.shape)}; allowed: {shapes}")
            for layer, scales in enumerate(value.view(layers, -1).tolist()):
                for scale in scales:
                    if not 0.0 < scale < float("inf"):
                        raise RopoolError(
                            f"{name} of layer {layer} is {scale}; allowed: positive and finite"
                        )


def scale_names(spec: ModelSpec) -> tuple[str, ...]:
    """What the scales of such a model are called, in the order of `CacheScales.values`."""
    return ("k_scale", "v_scale") if isinstance(spec.row, KVRow) else ("row_scale",)
