"""The compiled part of ropool.ops._signature."""

from typing import Any

class Reader:
    def __init__(self, tensor_type: type, capsule: object) -> None: ...
    def read(self, args: tuple[Any, ...]) -> bytes: ...
