"""The path without a kernel of ours: the model's rotation and an indexed update of each pool.

Slots must be inside of the pool; the engine makes no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args


def rope_store_kv_(key: Key, args: Args, options: Options) -> Callable[[Args], tuple[Any, ...]]:
    """`launch((q, k, v, k_pool, v_pool, rotation, positions, slots))` returns `(q, k, k_pool,
    v_pool)`; `rotation.module` is the model's own rotation."""
    store = store_kv_(key, args, options)

    def launch(args: Args) -> tuple[Any, ...]:
        q, k, v, k_pool, v_pool, rotation, positions, slots = args
        q, k = rotation.apply(q, positions), rotation.apply(k, positions)
        return q, k, *store((k, v, k_pool, v_pool, slots))

    return launch


def store_kv_(key: Key, args: Args, options: Options) -> Callable[[Args], tuple[Any, ...]]:
    """`launch((k, v, k_pool, v_pool, slots))` returns `(k_pool, v_pool)`."""

    def launch(args: Args) -> tuple[Any, ...]:
        k, v, k_pool, v_pool, slots = args
        pages, rows = slots // k_pool.shape[1], slots % k_pool.shape[1]
        # The arrays handed in are given up, so MLX updates them where they stand.
        k_pool[pages, rows] = k
        v_pool[pages, rows] = v
        return k_pool, v_pool

    return launch
