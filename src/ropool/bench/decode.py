"""What the fused op is worth in a whole model: a decode step of the engine in a CUDA graph, with
the op and with what else could do its work. Weights are random, since only time counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ropool.bench.decode_kernels import KERNELS, NOTHING, For, Function, Kernels
from ropool.bench.decode_models import MODELS
from ropool.engine.attention import paged_attention
from ropool.engine.cache import KVCache, PageTable
from ropool.engine.spec import LatentRow
from ropool.engine.step import Span, Step, build_step

BATCHES = (1, 16, 64, 256)
CONTEXT = 512
"""Tokens that each request has in the pool, the new one included; whole pages."""
WARM_UP_STEPS = 3
FUSED = "ropool"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A decode step of one model at one batch size with one kind of kernels."""

    model: str
    layers: int
    batch: int
    context: int
    kernels: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    slower: float | None = None
    """How much longer the step is than with the fused op, as a fraction."""
    logits_off: float | None = None
    """Distance of the logits to those with the fused op, over their length; a bfloat16 table of
    angles alone makes some hundredths of it."""
    note: str = ""

    def line(self) -> str:
        """For a terminal."""
        start = f"{self.model} batch {self.batch:>3}  {self.kernels:<16}"
        if self.p50_us is None:
            return f"{start}{self.note}"
        slower = "" if self.slower is None else f"{100 * self.slower:>+8.2f} %"
        return f"{start}{self.p50_us:>10.1f} us{slower}  logits off {self.logits_off}"


def decode_steps(models: Sequence[str], device: torch.device, rounds: int) -> Iterator[StepTime]:
    """Every model at every batch size with every kind of kernels."""
    for name in models:
        model = random_model(name, device)
        cache = KVCache(
            model.spec,
            pool_tokens=max(BATCHES) * CONTEXT,
            max_requests=max(BATCHES),
            max_batch_tokens=max(BATCHES),
        )
        for batch in BATCHES:
            yield from one_batch(name, model, cache, batch, rounds)
        del model, cache
        torch.cuda.empty_cache()


def random_model(name: str, device: torch.device) -> Any:
    """The model over ropool's pool, bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ropool.integrations.transformers.model import PooledModel

    config = AutoConfig.for_model(**MODELS[name])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return PooledModel(model.eval())


def one_batch(name: str, model: Any, cache: KVCache, batch: int, rounds: int) -> Iterator[StepTime]:
    """The kinds of kernels in turn, round after round."""
    tables = [PageTable() for _ in range(batch)]
    for table in tables:
        cache.reserve(table, 0, CONTEXT)
    positions = [[CONTEXT - 1]] * model.spec.position_streams
    spans = [
        Span([7 + i], CONTEXT - 1, table, sample=True, positions=positions, embeddings=())
        for i, table in enumerate(tables)
    ]
    step = build_step(spans, cache)
    functions: list[Function] = []  # they own tensors that the graphs read
    replays: dict[str, Callable[[], None]] = {}
    logits: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for kind, kernels in KERNELS.items():
        reason = kernels.unavailable(step.tokens.device)
        if kind != FUSED and function_of(kernels, model) is None:
            reason = reason or "has no kernel for this model"
        if reason is not None:
            notes[kind] = f"not supported: {reason}"
            continue
        try:
            with replaced(model, kernels, step, functions):
                replays[kind], logits[kind] = captured(model, step)
        except Exception as error:  # a peer's own error is a result too
            notes[kind] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times: dict[str, list[float]] = {kind: [] for kind in replays}
    for _ in range(rounds):
        for kind, replay in replays.items():
            times[kind].append(microseconds(replay))
    fused = float(np.median(times[FUSED])) if FUSED in times else None
    for kind in KERNELS:
        row: dict[str, Any] = {
            "model": name,
            "layers": len(model.spec.windows),
            "batch": batch,
            "context": CONTEXT,
            "kernels": kind,
        }
        if kind not in times:
            yield StepTime(**row, note=notes[kind])
            continue
        p20, p50, p80 = (round(float(np.percentile(times[kind], p)), 1) for p in (20, 50, 80))
        off = slower = None
        if fused is not None:
            slower = round(p50 / fused - 1, 5)
            want = logits[FUSED].double()
            if kind != NOTHING:
                off = round(float((logits[kind].double() - want).norm() / want.norm()), 6)
        yield StepTime(**row, p20_us=p20, p50_us=p50, p80_us=p80, slower=slower, logits_off=off)
    for table in tables:
        cache.release(table)


@contextmanager
def replaced(model: Any, kernels: Kernels, step: Step, functions: list[Function]) -> Iterator[None]:
    """While it lasts, the model's attention calls `kernels` where it calls the op. What it calls is
    added to `functions`."""
    from ropool.integrations.transformers import attention, mla

    made = function_of(kernels, model)
    if made is None:
        yield
        return
    function = made(step)
    functions.append(function)
    if isinstance(model.spec.row, LatentRow):
        with mock.patch.object(mla, "rope_store_mla_", function):
            yield
        return
    elsewhere: Tensor | None = None

    def rotate_and_store(q: Tensor, *others: Any, **options: Any) -> None:
        nonlocal elsewhere
        elsewhere = function(q, *others, **options)

    def attend_to_rotated(q: Tensor, *others: Any) -> Tensor:
        return paged_attention(q if elsewhere is None else elsewhere, *others)

    with (
        mock.patch.object(attention, "rope_store_kv_", rotate_and_store),
        mock.patch.object(attention, "paged_attention", attend_to_rotated),
    ):
        yield


def function_of(kernels: Kernels, model: Any) -> For | None:
    """What makes the function for the model's kind of attention."""
    latent = isinstance(model.spec.row, LatentRow)
    return kernels.rope_store_mla if latent else kernels.rope_store_kv


def captured(model: Any, step: Step) -> tuple[Callable[[], None], Tensor]:
    """What replays a captured step, and its logits."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            model.forward(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        logits = model.forward(step)
    graph.replay()
    torch.cuda.synchronize()
    kept = logits.clone()

    def replay() -> None:
        graph.replay()

    return replay, kept


def microseconds(replay: Callable[[], None]) -> float:
    """Time of one replay on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)
