"""The engine: requests in, text out, one step at a time."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropool.engine.cache import KVCache
from ropool.engine.calibration import Calibration, Prompt, within_limit
from ropool.engine.detokenizer import Detokenizer
from ropool.engine.inputs import PromptInputs
from ropool.engine.model import CausalModel, Tokenizer
from ropool.engine.pools import CacheDtype
from ropool.engine.request import FinishReason, Request, SamplingParams
from ropool.engine.sampling import sample
from ropool.engine.scales import CacheScales
from ropool.engine.scheduler import Scheduler
from ropool.engine.spec import ModelSpec
from ropool.engine.step import Span, build_step
from ropool.errors import RopoolError
from ropool.kvcache.mha import FP8_DTYPES


@dataclass(frozen=True)
class Event:
    """One more token of a request, with the text that became certain with it."""

    request: Request
    token: int
    text: str


@dataclass
class Throughput:
    """Tokens computed and the time it took. Steps that work on a prompt count as prefill, all
    others as decode."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Engine:
    """Generates text for any number of requests that share one pool of `pool_tokens` slots.

    Args:
        model: the model; its pools are allocated here.
        tokenizer: makes text of tokens; without one requests have tokens only.
        cache_dtype: float8_e4m3fn or float8_e5m2 for an fp8 pool, or `MLAFormat.FP8_DS_MLA` for the
            656-byte rows of an MLA model with `L = 512` and `R = 64`; the model's dtype by default.
        cache_scales: of an fp8 pool; by default those that the model's files have, or else those
            that `calibrate` finds with the prompts that wait at the first step.
        max_requests: requests that run at once.
        max_batch_tokens: tokens of one step; longer prompts are computed in chunks.

    Raises:
        RopoolError: no pool can be made of these arguments.

    Not thread-safe: one thread adds, aborts and steps.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer | None = None,
        *,
        pool_tokens: int,
        cache_dtype: CacheDtype | None = None,
        cache_scales: CacheScales | None = None,
        max_requests: int = 64,
        max_batch_tokens: int = 512,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        try:
            self.cache = self._new_cache(
                model.spec,
                pool_tokens=pool_tokens,
                max_requests=max_requests,
                max_batch_tokens=max_batch_tokens,
                dtype=cache_dtype,
            )
        except (MemoryError, RuntimeError) as error:  # PyTorch raises the latter
            raise RopoolError(
                f"a pool of {pool_tokens} tokens does not fit the memory of {model.spec.device}"
            ) from error
        if cache_scales is None and cache_dtype in FP8_DTYPES:
            cache_scales = model.cache_scales
        if cache_scales is not None:
            self.cache.set_scales(cache_scales)
        self._calibrates = cache_scales is None and cache_dtype in FP8_DTYPES
        self._pending: deque[Event] = deque()
        self.scheduler = Scheduler(
            self.cache, max_requests=max_requests, max_batch_tokens=max_batch_tokens
        )
        self.throughput = Throughput()
        self._ids = itertools.count()

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        inputs: PromptInputs | None = None,
    ) -> Request:
        """Queue a prompt, with `inputs` when it has more than tokens, such as images.

        Raises `RopoolError` when it can never be served: empty, longer than the model's context,
        or, with its answer, larger than the pool; and when the inputs do not fit it.
        """
        params = params or SamplingParams()
        limit, slots = self.model.spec.max_position, self.cache.allocator.slots
        if not isinstance(prompt, Sequence):
            raise RopoolError(f"the prompt is {type(prompt).__name__}; allowed: a list of integers")
        if not prompt:
            raise RopoolError("the prompt is empty: it has no token")
        vocabulary = self.model.spec.vocabulary
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise RopoolError(f"the prompt has token {token!r}; allowed: 0 to {vocabulary - 1}")
        if inputs is not None:
            inputs.check(len(prompt), self.model.spec)
        detokenizer = Detokenizer(self.tokenizer) if self.tokenizer else None
        request = Request(next(self._ids), list(prompt), params, detokenizer, inputs)
        if request.length >= limit:
            raise RopoolError(
                f"the prompt has {request.length} tokens; the model's context holds {limit}, "
                "the answer included"
            )
        # The last token of an answer is never computed.
        needed = min(len(prompt) + params.max_new_tokens, limit) - 1
        if needed > slots:
            raise RopoolError(
                f"the pool has {slots} slots; a prompt of {len(prompt)} tokens with up to "
                f"{params.max_new_tokens} new tokens needs {needed}"
            )
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        """End a request now and take back its slots; nothing happens when it has ended already."""
        if request.finish_reason is None:
            self._finish(request, FinishReason.ABORT)

    def calibrate(self, prompts: Sequence[Sequence[int]]) -> CacheScales:
        """Give an fp8 pool the scales that suit the rows of these prompts, and return them.

        The prompts are computed in a small pool in the model's dtype: in order, while they have no
        more than `CALIBRATION_TOKENS` together, the first in any case. The scales hold until the
        engine ends, since every row is read with them. Raises `RopoolError` after the first step.
        """
        return self._calibrate([(prompt, None) for prompt in prompts])

    def _calibrate(self, prompts: Sequence[Prompt]) -> CacheScales:
        dtype = self.cache.dtype
        if not isinstance(dtype, torch.dtype) or dtype not in FP8_DTYPES:
            raise RopoolError(f"a pool of {dtype} has no scales to calibrate; an fp8 one has")
        if not prompts:
            raise RopoolError("no prompt to calibrate on")
        chosen = within_limit(prompts)
        most = max(len(tokens) for tokens, _ in chosen)
        probe = Engine(self.model, pool_tokens=most, max_requests=1)
        calibration = Calibration(probe.cache)
        for tokens, inputs in chosen:
            probe.add(tokens, SamplingParams(max_new_tokens=1), inputs)
            while probe.unfinished:
                probe.step()
                calibration.look()
        scales = calibration.scales(dtype)
        self.cache.set_scales(scales)
        self._calibrates = False
        return scales

    @property
    def unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self.scheduler.running) + len(self.scheduler.waiting)

    def _new_cache(self, spec: ModelSpec, **sizes: Any) -> KVCache:
        return KVCache(spec, **sizes)

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        """The logits after the spans that are sampled, in their order."""
        return self.model.forward(build_step(spans, self.cache))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run one forward pass and return the tokens that came of it; none while only prompts are
        computed."""
        started = time.perf_counter()
        if self._calibrates and self.scheduler.waiting:
            self._calibrate(
                [(request.tokens, request.inputs) for request in self.scheduler.waiting]
            )
        batch = self.scheduler.schedule()
        if not batch:
            return []
        spans = [request.span(count, self.model.spec) for request, count in batch]
        prefill = any(request.remaining > 1 for request, _ in batch)
        logits = self._forward(spans)
        requests = [pair[0] for pair, span in zip(batch, spans, strict=True) if span.sample]
        tokens = sample(logits, requests) if requests else []
        for request, count in batch:
            request.computed += count
        events = [self._append(*pair) for pair in zip(requests, tokens, strict=True)]
        self._count(prefill, sum(count for _, count in batch), time.perf_counter() - started)
        return events

    def stream(self) -> Iterator[Event]:
        """Run until every request has ended; yield each token as it comes. Requests may be added
        and aborted between two events; an aborted request has none after that."""
        while self._pending or self.unfinished:
            if not self._pending:
                self._pending.extend(self.step())
                continue
            event = self._pending.popleft()
            if event.request.finish_reason is not FinishReason.ABORT:
                yield event

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None
    ) -> list[Request]:
        """Answer all prompts as one continuous batch and return their requests, in order."""
        requests = [self.add(prompt, params) for prompt in prompts]
        for _ in self.stream():
            pass
        return requests

    def _append(self, request: Request, token: int) -> Event:
        spec = self.model.spec
        request.tokens.append(token)
        piece = request.detokenizer.push(token) if request.detokenizer else ""
        request.text += piece
        if token in spec.eos_ids:
            piece += self._finish(request, FinishReason.STOP)
        elif (
            len(request.output) >= request.params.max_new_tokens
            or request.length >= spec.max_position
        ):
            piece += self._finish(request, FinishReason.LENGTH)
        elif len(request.tokens) - 1 == spec.rotary_switch:
            # The keys in the pool are rotated as those of a shorter request.
            self.scheduler.restart(request)
        return Event(request, token, piece)

    def _finish(self, request: Request, reason: FinishReason) -> str:
        """End a request; return the text that was held back."""
        self.scheduler.remove(request)
        request.finish_reason = reason
        piece = request.detokenizer.flush() if request.detokenizer else ""
        request.text += piece
        return piece

    def _count(self, prefill: bool, tokens: int, seconds: float) -> None:
        if prefill:
            self.throughput.prefill_tokens += tokens
            self.throughput.prefill_seconds += seconds
        else:
            self.throughput.decode_tokens += tokens
            self.throughput.decode_seconds += seconds
