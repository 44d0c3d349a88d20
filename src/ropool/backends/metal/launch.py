"""Binds calls on MLX arrays to the primitives of `ropool_metal`.

MLX arrays are never changed: a launch returns the arrays that take the place of those that it was
given. Nothing is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ropool_metal

from ropool.dispatch.key import Key, Options
from ropool.dispatch.spec import Args


def rope_store_kv_(key: Key, args: Args, options: Options) -> Callable[[Args], tuple[Any, ...]]:
    """`launch((q, k, v, k_pool, v_pool, rotation, positions, slots))` returns `(q, k, k_pool,
    v_pool)`; `rotation` gives the keyword arguments that choose the angles."""

    def launch(args: Args) -> tuple[Any, ...]:
        q, k, v, k_pool, v_pool, rotation, positions, slots = args
        return ropool_metal.rope_pool_fused(
            q, k, v, positions, slots, k_pool, v_pool, **rotation.arguments
        )

    return launch


def store_kv_(key: Key, args: Args, options: Options) -> Callable[[Args], tuple[Any, ...]]:
    """`launch((k, v, k_pool, v_pool, slots))` returns `(k_pool, v_pool)`."""

    def launch(args: Args) -> tuple[Any, ...]:
        k, v, k_pool, v_pool, slots = args
        return ropool_metal.store_pool(k, v, slots, k_pool, v_pool)

    return launch
