"""What is static in a call. The key is the one interface between the ops and the kernels, so it
holds plain Python values only: PyTorch and MLX kernels live behind the same registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ropool.layouts import KVLayout


class Options(NamedTuple):
    """The options of a call that are no tensors; an op leaves those that it does not have at their
    default."""

    interleaved: bool = False
    mrope_section: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    layout: KVLayout = KVLayout.NHD
    norm_eps: float = 1e-6
    write_k: bool = False
    padding_slot: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The static facts of one call of one op; fields that an op does not have stay `None`, 0 or
    `False`.

    Two calls with equal keys may share one compiled kernel: token counts, strides and scalars that
    a kernel takes at run time (`norm_eps`, `padding_slot`) are not in the key. Dtypes are named as
    PyTorch names them, without the `torch.` prefix.
    """

    op: str
    dtype: str
    """Storage dtype of Q, K and V: `float16`, `bfloat16` or `float32`."""

    heads_q: int = 0
    heads_kv: int = 0
    head_dim: int = 0
    """`D`, the width of a query and key head. For the MLA ops, the width of the rope part."""
    v_head_dim: int = 0
    """Width of a value head; equal to `head_dim` for most models."""
    latent_dim: int = 0
    """`L`, the width of the MLA latent part; 0 for the other ops."""

    rotary_dim: int = 0
    """`R`; 0 when the op does not rotate."""
    interleaved: bool = False
    """Pairs are `(2i, 2i+1)`; otherwise (neox) `(i, i + R/2)`."""
    table_dtype: str | None = None
    """dtype of the cos/sin cache."""
    position_dtype: str | None = None
    offset_dtype: str | None = None
    """dtype of `offsets`, or `None` when there are none."""
    mrope_section: tuple[int, ...] | None = None
    """How many of the `R/2` frequencies follow the temporal, height and width position."""
    mrope_interleaved: bool = False

    q_norm_dtype: str | None = None
    """dtype of the query RMSNorm weight; `None`: no norm."""
    k_norm_dtype: str | None = None

    layout: str | None = None
    """A `KVLayout` value; `None` when the op has no KV pool."""
    page_size: int = 0
    """`B`, tokens a page holds."""
    k_dim_group: int = 0
    """`x` of the packed layouts: contiguous dims of one K row; `head_dim` otherwise."""
    v_row_group: int = 0
    """`x` of the shuffled V layout: contiguous rows of one dim; 1 in row-major layouts."""
    pool_dtype: str | None = None
    row_format: str | None = None
    """MLA row: `model`, `fp8` or `fp8_ds_mla` (the 656-byte row)."""
    slot_dtype: str | None = None
    window_map_dtype: str | None = None
    """dtype of the full-to-window slot map, or `None` when there is none."""
    k_scale: str | None = None
    """`tensor` (one scale), `head` (one a head) or `None` (scale 1). The MLA row's scale stands
    here too."""
    v_scale: str | None = None

    write_k: bool = False
    """The rotated K is written back into the argument as well."""
    q_out_dtype: str | None = None
    """dtype of `q_out`; `None`: Q is rotated in place."""
    q_scale: str | None = None

    def describe(self) -> str:
        """The fields that are set, in one line, for messages and reports."""
        shown = [
            f"{name}={value}"
            for name in self.__slots__
            if name != "op" and (value := getattr(self, name)) not in (None, 0, False)
        ]
        return f"{self.op}({', '.join(shown)})"
