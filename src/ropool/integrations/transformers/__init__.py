"""Models of the `transformers` library over ropool's pool."""

from ropool.integrations.transformers.load import load
from ropool.integrations.transformers.model import FAMILIES, PooledModel

__all__ = ["FAMILIES", "PooledModel", "load"]
