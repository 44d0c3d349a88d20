"""Pools that hold keys and values, and the allocator that says whose slots are whose."""

from ropool.kvcache.allocator import PoolExhaustedError, SlotAllocator
from ropool.kvcache.mha import MHAPool
from ropool.kvcache.mla import MLAFormat, MLAPool
from ropool.kvcache.window import WindowMap

__all__ = ["MHAPool", "MLAFormat", "MLAPool", "PoolExhaustedError", "SlotAllocator", "WindowMap"]
