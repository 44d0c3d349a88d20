"""The model families that the engine runs: one record for each `model_type`.

A family whose decoder is put together like another's shares its record. One that is not gets a
record of its own, in a file of its own when its attention is read in another way too.
"""

from __future__ import annotations

from ropool.errors import RopoolError
from ropool.integrations.transformers.families.deepseek import DEEPSEEK
from ropool.integrations.transformers.families.family import Family
from ropool.integrations.transformers.families.gemma3 import GEMMA3, GEMMA3_TEXT
from ropool.integrations.transformers.families.gpt_neox import GPT_NEOX
from ropool.integrations.transformers.families.llama import LLAMA, MISTRAL, QWEN2_VL
from ropool.integrations.transformers.families.phi3 import PHI3

FAMILIES: dict[str, Family] = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3_TEXT,
    "glm": LLAMA,
    "gpt_neox": GPT_NEOX,
    "gpt_oss": LLAMA,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen2_vl": QWEN2_VL,
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA,
}
"""`model_type` -> how its models are taken apart."""


def family_of(model_type: str) -> Family:
    """The record of a family. Raises `RopoolError` for one that is not covered."""
    if model_type not in FAMILIES:
        covered = ", ".join(sorted(FAMILIES))
        raise RopoolError(f"model family {model_type!r} is not covered; covered: {covered}")
    return FAMILIES[model_type]
