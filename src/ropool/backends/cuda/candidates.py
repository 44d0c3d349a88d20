"""The layouts that `ropool tune` measures, and their compilation beforehand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from ropool.backends.cuda import compile
from ropool.backends.cuda.choose import shape_of
from ropool.backends.cuda.grid import grid_of
from ropool.backends.cuda.launch import describe_aligned, source_of
from ropool.backends.cuda.shape import LOADS, Shape, checked, narrowed, possible
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.dispatch.tuning import Choice

EARLY_TOKENS = 4096
"""Calls of more tokens are bound by bandwidth on every GPU: prefetching early is not tried."""
MANY_TOKENS = 1024
"""Calls of more tokens than so may be bound by bandwidth: what suits those is tried too."""
FEW_TOKENS = 128
"""Calls of no more tokens may last as long as one thread's work does."""
THREADS = (64, 128, 256)
LANES = (8, 12, 24, 32, 36)


def in_force(key: Key, args: Args, options: Options, device: int) -> Choice:
    """The layout that such a call has now."""
    gpu = torch.cuda.get_device_properties(device)
    call = describe_aligned(key, args, options, device)
    shape = shape_of(call, f"sm_{gpu.major}{gpu.minor}", gpu.multi_processor_count, gpu.name)
    default = Shape()._asdict()
    return {
        name: value
        for name, value in shape._asdict().items()
        if name != "dependent" and value != default[name]
    }


def layouts(key: Key, tokens: int) -> list[Choice]:
    """What is tried first for calls of `key` with so many tokens."""
    early = (False, True) if tokens <= EARLY_TOKENS else (False,)
    many = tokens >= MANY_TOKENS
    loads = {"loads": "cached"} if many else {}
    found: list[Choice] = []
    if key.rotary_dim:
        rows = [n for n in (1, 2, 3, 4, 8) if key.heads_q % n == 0][:4] or [1]
        keys = [n for n in (1, 2) if n <= max(key.heads_kv, 1)]
        values = (1, 2) if key.latent_dim else (1,)
        for threads, e, q in itertools.product(THREADS, early, rows):
            shared = {"q_rows": q, "threads": threads, "early": e, **loads}
            for k, v in itertools.product(keys, values):
                found.append(shared | {"k_rows": k, "v_rows": v})
            found.append(shared | {"joint": True})
        return found + _shorter(found, tokens)
    for threads, e in itertools.product((32, *THREADS) if many else THREADS, early):
        shared = {"threads": threads, "early": e, **loads}
        if key.latent_dim and key.row_format == "model":
            found += [shared | {"lanes": lanes} for lanes in LANES]
        else:
            found += [shared | {"k_rows": n, "v_rows": n} for n in (1, 2, 4, 8)]
    found += _shorter(found, tokens)
    if many and key.row_format == "model":
        found += [
            {"bulk": True, "threads": rows, "early": e}
            for rows, e in itertools.product((2, 4, 8, 16), early)
        ]
    return found


def _shorter(choices: list[Choice], tokens: int) -> list[Choice]:
    """The same with shorter vectors, for calls that are bound by latency."""
    if tokens >= MANY_TOKENS:
        return []
    shorter = (8, 4) if tokens <= FEW_TOKENS else (8,)
    return [{**choice, "vector_bytes": length} for length in shorter for choice in choices]


def refinements(key: Key, tokens: int, choice: Choice) -> list[Choice]:
    """What is tried with the best of them."""
    if choice.get("bulk"):
        return []
    tried = choice.get("loads", "plain")
    found: list[Choice] = [{**choice, "loads": loads} for loads in LOADS if loads != tried]
    if key.rotary_dim and tokens >= MANY_TOKENS:
        found += [{**choice, "loads": loads, "ahead": False} for loads in LOADS]
    return found


def prepare(calls: Iterable[tuple[Key, Args, Options, Choice]], device: int) -> None:
    """Compile what the calls need into the cache on disk, on every core."""
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    texts = set()
    for key, args, options, choice in calls:
        call = describe_aligned(key, args, options, device)
        shape = possible(checked(choice)._replace(dependent=major >= 9), call)
        call = narrowed(call, shape)
        texts.add(source_of(call, shape, grid_of(call, shape)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda text: compile.cubin(text, arch), texts))
