"""The sizes of programs that `ropool tune` measures, and their compilation beforehand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from triton.runtime import driver

from ropool.backends.triton import launch
from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args
from ropool.dispatch.tuning import Choice


def in_force(key: Key, args: Args, options: Options, device: int) -> Choice:
    """The sizes that such a call has now."""
    return launch.choice_in_force(key, args[0])


def layouts(key: Key, tokens: int) -> list[Choice]:
    """What is tried for calls of `key` with so many tokens."""
    sizes = itertools.product((1, 2, 4, 8), (1, 2, 4, 8))
    return [{"warps": warps, "vectors": vectors} for warps, vectors in sizes]


def refinements(key: Key, tokens: int, choice: Choice) -> list[Choice]:
    """None: two numbers say everything."""
    return []


def prepare(calls: Iterable[tuple[Key, Args, Options, Choice]], device: int) -> None:
    """Compile what the calls need, on every core: one of many layouts takes half a second."""
    driver.active.get_current_target()  # initialised by one thread
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda call: launch.compile_ahead(*call), calls))
