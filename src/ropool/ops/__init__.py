"""The five ops. Each module holds one: public function, torch schema, validation, key."""

from ropool.ops.rope import rope_
from ropool.ops.rope_store_kv import rope_store_kv_
from ropool.ops.rope_store_mla import rope_store_mla_
from ropool.ops.store_kv import store_kv_
from ropool.ops.store_mla import store_mla_

__all__ = ["rope_", "rope_store_kv_", "rope_store_mla_", "store_kv_", "store_mla_"]
