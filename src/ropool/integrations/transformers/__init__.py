"""Models of the `transformers` library over ropool's pool."""

from ropool.integrations.transformers.families import FAMILIES
from ropool.integrations.transformers.images import image_inputs
from ropool.integrations.transformers.load import load
from ropool.integrations.transformers.model import PooledModel

__all__ = ["FAMILIES", "PooledModel", "image_inputs", "load"]
