"""A small engine: continuous batching over one KV pool."""

from ropool.engine.engine import Engine, Event, Throughput
from ropool.engine.inputs import PromptInputs
from ropool.engine.request import FinishReason, Request, SamplingParams
from ropool.engine.scales import CacheScales
from ropool.engine.spec import ModelSpec

__all__ = [
    "CacheScales",
    "Engine",
    "Event",
    "FinishReason",
    "ModelSpec",
    "PromptInputs",
    "Request",
    "SamplingParams",
    "Throughput",
]
