"""The latent pool of multi-head latent attention (MLA): one row a token instead of K and V
heads."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor


class MLAFormat(enum.StrEnum):
    """What a row of `L` latent and `R` rope values is stored as."""

    MODEL = "model"
    """`L + R` values of the model's dtype."""
    FP8 = "fp8"
    """`L + R` values of fp8 with one scale a layer."""
    FP8_DS_MLA = "fp8_ds_mla"
    """656 bytes: 512 float8_e4m3fn latents, 4 float32 scales (one per 128 latents), 64 bfloat16
    rope values."""


DS_MLA_BYTES = 512 + 4 * 4 + 64 * 2
DS_MLA_DIMS = (512, 64)
"""`L` and `R` of the 656-byte row."""


class MLAPool:
    """Row tensors `[P, B, W]` of `layers` layers, zeroed, where `W` is `L + R` values, or 656
    bytes.

    Args:
        dtype: the model's dtype for format `model`; float8_e4m3fn or float8_e5m2 for `fp8`; ignored
            for `fp8_ds_mla`, which is uint8.
        scales: `[layers]`, float32, only for format `fp8`. 1 by default.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page_size: int,
        latent_dim: int,
        rope_dim: int,
        dtype: torch.dtype,
        row_format: MLAFormat = MLAFormat.MODEL,
        device: torch.device | str = "cpu",
        scales: Tensor | None = None,
    ) -> None:
        self.layers, self.pages, self.page_size = layers, pages, page_size
        self.row_format = MLAFormat(row_format)
        width = latent_dim + rope_dim
        if self.row_format is MLAFormat.FP8_DS_MLA:
            if (latent_dim, rope_dim) != DS_MLA_DIMS:
                raise ValueError(
                    "MLAPool: row format fp8_ds_mla holds 512 latents and 64 rope values, "
                    f"got {latent_dim} and {rope_dim}"
                )
            dtype, width = torch.uint8, DS_MLA_BYTES
        elif (dtype.itemsize == 1) != (self.row_format is MLAFormat.FP8):
            raise ValueError(
                f"MLAPool: row format {self.row_format.value} does not go with dtype {dtype}"
            )
        if scales is not None and (
            self.row_format is not MLAFormat.FP8
            or scales.dtype != torch.float32
            or scales.shape != (layers,)
        ):
            raise ValueError(f"MLAPool: scales must be float32 [{layers}] and the row format fp8")
        self._rows = torch.zeros((layers, pages, page_size, width), dtype=dtype, device=device)
        self._scales = None if scales is None else scales.to(device)

    def rows(self, layer: int) -> Tensor:
        """The rows of a layer, `[P, B, W]`, a view."""
        return self._rows[layer]

    def scale(self, layer: int) -> Tensor | None:
        """The scale of a layer, `[]`; `None`: 1."""
        return None if self._scales is None else self._scales[layer]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return self._rows.nbytes

    def clear(self, pages: Sequence[int]) -> None:
        """Zero these pages in every layer."""
        index = torch.tensor(pages, device=self._rows.device)
        self._rows.view(torch.uint8).index_fill_(1, index, 0)
