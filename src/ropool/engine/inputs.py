"""What a prompt may bring beside its tokens: positions in three dimensions, and embeddings that no
token has, such as those of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ropool.engine.spec import ModelSpec
from ropool.errors import RopoolError


@dataclass(frozen=True, eq=False)
class PromptInputs:
    """Positions and embeddings of the tokens of a prompt; the tensors must not change while its
    request runs."""

    positions: Tensor | None = None
    """`[3, n]`, int32 or int64: temporal, height and width position of each of the `n` tokens, for
    models with M-RoPE. The answer goes on after the largest of them, in all three alike. `None`: 0
    to `n - 1`."""
    embeddings: Mapping[int, Tensor] = field(default_factory=dict)
    """Number of a token -> `[m, hidden]`: rows that stand for it and the tokens after it, in place
    of those that the model's embedding has."""

    @cached_property
    def shift(self) -> int:
        """Of the tokens of the answer: position minus number."""
        if self.positions is None:
            return 0
        return int(self.positions.max()) + 1 - self.positions.shape[1]

    def check(self, tokens: int, spec: ModelSpec) -> None:
        """Raise `RopoolError` when this does not fit a prompt of so many tokens, or the model."""
        if self.positions is not None:
            self._check_positions(self.positions, tokens, spec)
        if self.embeddings and not spec.takes_embeddings:
            raise RopoolError("the prompt has embeddings; this model is covered without them only")
        for first, rows in self.embeddings.items():
            if not isinstance(first, int) or not isinstance(rows, Tensor):
                raise RopoolError(
                    f"embeddings has {first!r} -> {type(rows).__name__}; allowed: an integer -> a "
                    "tensor"
                )
        end = 0
        for first, rows in sorted(self.embeddings.items()):
            if rows.dim() != 2 or rows.shape[1] != spec.hidden_size:
                raise RopoolError(
                    f"the embeddings from token {first} on are {list(rows.shape)}; allowed: "
                    f"[tokens, {spec.hidden_size}]"
                )
            if first < end or first + len(rows) > tokens:
                raise RopoolError(
                    f"{len(rows)} embeddings stand from token {first} on; free are tokens {end} "
                    f"to {tokens - 1}"
                )
            end = first + len(rows)

    def _check_positions(self, positions: Tensor, tokens: int, spec: ModelSpec) -> None:
        if spec.position_streams != 3:
            raise RopoolError("the prompt has 3-D positions; allowed: for models with M-RoPE only")
        if not isinstance(positions, Tensor):
            raise RopoolError(f"the positions are {type(positions).__name__}; allowed: a tensor")
        integer = positions.dtype in (torch.int32, torch.int64)
        if positions.shape != (3, tokens) or not integer:
            raise RopoolError(
                f"the positions are {positions.dtype} {list(positions.shape)}; allowed: int32 or "
                f"int64 [3, {tokens}]"
            )
        if int(positions.min()) < 0:
            raise RopoolError(f"a position is {int(positions.min())}; allowed: at least 0")

    def positions_of(self, start: int, end: int) -> list[Sequence[int]] | None:
        """The three positions of tokens `start` to `end`; `None` where they are their numbers."""
        if self.positions is None:
            return None
        answer = range(max(start, self.positions.shape[1]) + self.shift, end + self.shift)
        return [[*stream, *answer] for stream in self.positions[:, start:end].tolist()]

    def embeddings_of(self, start: int, end: int) -> list[tuple[int, Tensor]]:
        """The rows for tokens `start` to `end`: number of the first one, counted from `start`, and
        `[m, hidden]`."""
        found = []
        for first, rows in self.embeddings.items():
            low, high = max(first, start), min(first + len(rows), end)
            if low < high:
                found.append((low - start, rows[low - first : high - first]))
        return found
