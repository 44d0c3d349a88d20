"""One prompt and its answer, from arrival to the last token."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field
from numbers import Integral, Real

from ropool.engine.cache import PageTable
from ropool.engine.detokenizer import Detokenizer
from ropool.engine.inputs import PromptInputs
from ropool.engine.spec import ModelSpec
from ropool.engine.step import Span
from ropool.errors import RopoolError


class FinishReason(enum.StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """The model said so."""
    LENGTH = "length"
    """`max_new_tokens`, or the model's context, is used up."""
    ABORT = "abort"
    """The caller gave it up."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy. A request's text depends on its own `seed`
    only, never on the other requests of a batch."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, name, options in (
            (Integral, "an integer", ("max_new_tokens", "seed")),
            (Real, "a number", ("temperature", "top_p")),
        ):
            for option in options:
                if not isinstance(value := getattr(self, option), kind):
                    raise RopoolError(f"{option} is {value!r}, must be {name}")
        if self.max_new_tokens < 1:
            raise RopoolError(f"max_new_tokens is {self.max_new_tokens}, must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise RopoolError(f"temperature is {self.temperature}, must be 0 (greedy) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise RopoolError(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if self.seed < 0:
            raise RopoolError(f"seed is {self.seed}, must be at least 0")


@dataclass(eq=False)
class Request:
    """The state of one request. `tokens` is the prompt followed by the answer so far."""

    request_id: int
    tokens: list[int]
    params: SamplingParams
    detokenizer: Detokenizer | None = None
    inputs: PromptInputs | None = None
    table: PageTable = field(default_factory=PageTable)
    computed: int = 0
    """Tokens whose K and V are in the pool; 0 again after a preemption."""
    text: str = ""
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self._random = random.Random(self.params.seed)
        self._drawn = (-1, 0.0)  # number of tokens, and what was drawn for the next one

    def draw(self) -> float:
        """The random number, 0 to 1, that chooses the next token; the same until it is appended, so
        that a step that failed and is run again gives the same text."""
        if self._drawn[0] != len(self.tokens):
            self._drawn = len(self.tokens), self._random.random()
        return self._drawn[1]

    @property
    def output(self) -> list[int]:
        """The tokens of the answer, the end-of-text token included."""
        return self.tokens[self.prompt_tokens :]

    @property
    def length(self) -> int:
        """Tokens of the context that are used: their number, or the next position where that is
        greater."""
        return len(self.tokens) + (max(self.inputs.shift, 0) if self.inputs else 0)

    def span(self, count: int, spec: ModelSpec) -> Span:
        """The next `count` tokens to be computed."""
        start, end = self.computed, self.computed + count
        positions = self.inputs.positions_of(start, end) if self.inputs else None
        if positions is None:
            switch = spec.rotary_switch
            first = switch if switch is not None and len(self.tokens) > switch else 0
            positions = [range(first + start, first + end)] * spec.position_streams
        return Span(
            tokens=self.tokens[start:end],
            start=start,
            table=self.table,
            sample=end == len(self.tokens),
            positions=positions,
            embeddings=self.inputs.embeddings_of(start, end) if self.inputs else [],
        )

    @property
    def remaining(self) -> int:
        """Tokens to be computed before the next one can be chosen; 1 while decoding."""
        return len(self.tokens) - self.computed
