"""What the readers of Hugging Face configs share: lookups by name, and the refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

ORIGINAL_LENGTH = "original_max_position_embeddings"


def refuse(message: str) -> NoReturn:
    """Raise `ValueError` in the name of `RotaryConfig.from_hf`."""
    raise ValueError(f"ropool.RotaryConfig.from_hf: {message}")


class Fields:
    """The top level of a config, an object or a dict; a field that is `None` is absent."""

    def __init__(self, config: object) -> None:
        self.config = config

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that is present."""
        for name in names:
            if isinstance(self.config, Mapping):
                value = self.config.get(name)
            else:
                value = getattr(self.config, name, None)
            if value is not None:
                return value
        return default

    @property
    def max_position(self) -> int | None:
        """How many positions the model takes."""
        return self.get("max_position_embeddings", "n_positions")
