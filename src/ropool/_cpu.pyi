"""The compiled kernels; see csrc/cpu/types.hpp for what the fields mean. Strides are in bytes."""

from collections.abc import Callable, Sequence
from typing import Any

class Rows:
    def __init__(
        self, dtype: str, heads: int, dim: int, token_stride: int, head_stride: int
    ) -> None: ...

class Indices:
    def __init__(self, dtype: str, size: int, stride: int, stream_stride: int = 0) -> None: ...

class Plane:
    def __init__(
        self,
        dtype: str,
        pages: int,
        page_size: int,
        row_group: int,
        dim_group: int,
        page_stride: int,
        head_stride: int,
        row_group_stride: int,
        row_stride: int,
        dim_group_stride: int,
        dim_stride: int,
    ) -> None: ...

class Scales:
    def __init__(self, present: bool, stride: int = 0) -> None: ...

class Rotary:
    def __init__(
        self,
        rotary_dim: int,
        interleaved: bool,
        table_dtype: str,
        max_position: int,
        row_stride: int,
        positions: Indices,
        offsets: Indices | None,
        streams: Sequence[int],
    ) -> None: ...

class Call:
    tokens: int
    q: Rows
    k: Rows
    v: Rows
    q_out: Rows
    rotary: Rotary
    norm_eps: float
    k_pool: Plane
    v_pool: Plane
    v_tiles: bool
    tile_scales: int
    slots: Indices
    window: Indices
    padding_slot: int
    q_scale: Scales
    k_scale: Scales
    v_scale: Scales
    write_k: bool
    def set_q_norm(self, dtype: str) -> None: ...
    def set_k_norm(self, dtype: str) -> None: ...

class Launch:
    def __init__(
        self,
        call: Call,
        operands: Sequence[tuple[int, str, int]],
        threads: Callable[[], int],
    ) -> None: ...
    def __call__(self, args: tuple[Any, ...]) -> None: ...
    def freeze(self, args: tuple[Any, ...]) -> Callable[[], None]: ...
    @property
    def native(self) -> object: ...

def isa() -> dict[str, Any]: ...
