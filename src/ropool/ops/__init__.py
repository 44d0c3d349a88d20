"""The five ops. Each module holds one: public function, torch schema, validation, key."""

from ropool.ops.mla_names import can_use_set_mla_kv_buffer, set_mla_kv_buffer
from ropool.ops.rope import rope_
from ropool.ops.rope_store_kv import rope_store_kv_
from ropool.ops.rope_store_mla import rope_store_mla_
from ropool.ops.store_kv import store_kv_
from ropool.ops.store_mla import store_mla_

__all__ = [
    "can_use_set_mla_kv_buffer",
    "rope_",
    "rope_store_kv_",
    "rope_store_mla_",
    "set_mla_kv_buffer",
    "store_kv_",
    "store_mla_",
]
