"""The compiled part of ropool.ops._launches, ropool.ops._eager and ropool.backends.cuda.driver."""

from collections.abc import Callable, Sequence
from typing import Any

class Torch:
    def __init__(self, functions: dict[str, int], samples: Sequence[tuple[Any, int]]) -> None: ...

class Launches:
    def __init__(
        self,
        tensors: int,
        options: int,
        torch: Torch,
        tensor_type: type,
        parameter_type: type,
    ) -> None: ...
    def find(
        self, args: tuple[Any, ...], options: tuple[Any, ...], backend: str | None
    ) -> Callable[[tuple[Any, ...]], None] | None: ...
    def epoch(self) -> int: ...
    def keep(
        self,
        args: tuple[Any, ...],
        options: tuple[Any, ...],
        backend: str | None,
        launch: Callable[[tuple[Any, ...]], None],
        epoch: int,
    ) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

class Entry:
    def __init__(
        self,
        launches: Launches,
        parameters: Sequence[tuple[str, int]],
        positional: int,
        defaults: tuple[object, ...],
        required: object,
        flags: dict[str, Any],
        flag: str,
        probes: tuple[Callable[[], object], ...],
    ) -> None: ...
    def stages(self, args: tuple[Any, ...], kwargs: dict[str, Any], calls: int) -> list[float]: ...

class Function:
    def __init__(self, definition: Callable[..., None]) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> None: ...
    def connect(self, entry: Entry) -> None: ...

def cuda_launch(
    functions: dict[str, int],
    kernel: int,
    device: int,
    frame: bytes,
    stream_at: int,
    parameters_at: int,
    operands: Sequence[tuple[int, int]],
) -> object: ...
def frozen(native: object, otherwise: Callable[[], None]) -> Callable[[], None]: ...
