"""Workloads times providers: check each, time those that can run, and give a row for every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ropool.bench.check import difference
from ropool.bench.inputs import make_sets
from ropool.bench.provider import Provider
from ropool.bench.timing import CpuTimer, Samplers, Timer, Timing, interleaved
from ropool.bench.traffic import min_bytes
from ropool.bench.workload import Workload
from ropool.errors import RopoolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One provider on one workload; a provider that did not run has a `note` and no figures."""

    op: str
    provider: str
    device: str
    dtype: str
    kv_dtype: str
    heads_q: int
    heads_kv: int
    head_dim: int
    rotary_dim: int
    tokens: int
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    min_bytes: int
    gbps: float | None = None
    """`min_bytes / p50_us`, in 10^9 bytes a second."""
    floor_us: float | None = None
    """`min_bytes` at the copy bandwidth of the machine, measured beside the providers."""
    correct: bool | None = None
    version: str
    latent_dim: int = 0
    q_dtype: str = ""
    norm: bool = False
    serial_us: float | None = None
    """Median without overlap of neighbouring calls, where the provider's kernels overlap."""
    note: str = ""


def timer_for(device: torch.device) -> Timer:
    """What times calls on `device`."""
    if device.type == "cpu":
        return CpuTimer()
    from ropool.bench.cuda_graphs import CudaTimer

    return CudaTimer(device)


def measure(
    workloads: Sequence[Workload],
    providers: Sequence[Provider],
    device: torch.device,
    rounds: int,
    started: Callable[[Workload], None] = lambda workload: None,
    wanted: Callable[[Workload, Provider], bool] = lambda workload, provider: True,
) -> Iterator[list[Row]]:
    """The rows of one workload after the other, in the order of `providers`, of those that are
    `wanted`. `started` is told of each workload before it runs."""
    timer = timer_for(device)
    for workload in workloads:
        started(workload)
        with torch.no_grad():
            mine = [provider for provider in providers if wanted(workload, provider)]
            yield measure_one(workload, mine, device, rounds, timer)


def measure_one(
    workload: Workload,
    providers: Sequence[Provider],
    device: torch.device,
    rounds: int,
    timer: Timer,
) -> list[Row]:
    """Check, then time. A provider that fails is reported; the others are measured all the same."""
    try:
        sets = make_sets(workload, device)
    except (MemoryError, RuntimeError) as error:  # PyTorch raises the latter
        raise RopoolError(
            f"bench: {workload.describe()} does not fit the memory of {device}"
        ) from error
    samplers: dict[str, Samplers] = {}
    notes: dict[str, str] = {}
    correct: dict[str, bool] = {}
    for provider in providers:
        reason = provider.unavailable(device) or provider.why_not(workload)
        if reason is not None:
            notes[provider.name] = f"not supported: {reason}"
            continue
        try:
            call = provider.build(workload)
            for inputs in sets:
                provider.prepare(workload, inputs)
            wrong = difference(workload, provider, call, sets[0])
            samplers[provider.name] = timer.prepare(call, sets)
        except Exception as error:  # a compiler or a package of someone else's: anything can come
            notes[provider.name] = f"failed: {first_line(error)}"
            continue
        correct[provider.name] = wrong is None
        notes[provider.name] = wrong or ""
    timing = interleaved(samplers, timer, rounds)
    return [
        row(workload, provider, device, timing, correct.get(provider.name), notes[provider.name])
        for provider in providers
    ]


def row(
    w: Workload,
    provider: Provider,
    device: torch.device,
    timing: Timing,
    correct: bool | None,
    note: str,
) -> Row:
    moved = min_bytes(w) + provider.extra_bytes(w)
    p20, p50, p80 = (None, None, None)
    serial = timing.serial.get(provider.name)
    if samples := timing.samples.get(provider.name):
        p20, p50, p80 = (round(float(np.percentile(samples, p)), 3) for p in (20, 50, 80))
    return Row(
        op=w.op,
        provider=provider.name,
        device=device.type,
        dtype=w.dtype,
        kv_dtype=w.kv_dtype,
        heads_q=w.heads_q,
        heads_kv=w.heads_kv,
        head_dim=w.head_dim,
        rotary_dim=w.rotary_dim,
        tokens=w.tokens,
        p20_us=p20,
        p50_us=p50,
        p80_us=p80,
        min_bytes=moved,
        gbps=None if p50 is None else round(moved / p50 / 1e3, 4),
        floor_us=round(moved / timing.copy_gbps / 1e3, 3),
        correct=correct,
        version=provider.version(),
        latent_dim=w.latent_dim,
        q_dtype=w.q_dtype,
        norm=w.norm,
        serial_us=round(float(np.median(serial)), 3) if serial else None,
        note=note,
    )


def first_line(error: Exception) -> str:
    """The class and the first line of what an error says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
