"""DeepSeek-V2 and V3: multi-head latent attention, and otherwise a decoder like Llama's whose later
layers have experts."""

from __future__ import annotations

from ropool.integrations.transformers.families.family import Family
from ropool.integrations.transformers.mla import LatentAttention

DEEPSEEK = Family(attention=LatentAttention)
