"""Rotate query and key heads (RoPE) and write keys and values into the paged KV pool, in one memory
pass."""

from ropool.dispatch import NoKernelError
from ropool.layouts import KVLayout
from ropool.ops import (
    can_use_set_mla_kv_buffer,
    rope_,
    rope_store_kv_,
    rope_store_mla_,
    set_mla_kv_buffer,
    store_kv_,
    store_mla_,
)
from ropool.ops._explain import Explanation, explain
from ropool.ops._plan import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "KVLayout",
    "NoKernelError",
    "Plan",
    "__version__",
    "can_use_set_mla_kv_buffer",
    "explain",
    "plan",
    "rope_",
    "rope_store_kv_",
    "rope_store_mla_",
    "set_mla_kv_buffer",
    "store_kv_",
    "store_mla_",
]
