"""What a Hugging Face config leaves to its model's code: pair style, M-RoPE streams, and defaults
that a `config.json` may leave out. Keyed by `model_type`."""

from __future__ import annotations

INTERLEAVED_PAIRS = frozenset(
    {
        "axk1",
        "axk2",
        "bailing_hybrid",
        "blt_global_transformer",
        "blt_local_decoder",
        "blt_local_encoder",
        "blt_patcher",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "dots3_note_text",
        "ernie4_5",
        "ernie4_5_moe",
        "glm",
        "glm4",
        "glm4_moe_lite",
        "glm4v",
        "glm4v_text",
        "glm_moe_dsa",
        "glm_ocr_text",
        "gptj",
        "helium",
        "kimi_k2",
        "llama4_text",
        "longcat_flash",
        "mistral4",
        "mistral_large4_text",
        "moonshine",
        "moonshine_streaming",
        "youtu",
    }
)
"""Families that pair `(2i, 2i+1)`."""

INTERLEAVE_OPTION = frozenset({"axk1", "deepseek_v3", "glm4_moe_lite", "mistral4", "youtu"})
"""Those of them whose code reads `rope_interleave`: neox pairs where it is false."""

WHOLE_HEAD = frozenset(
    {
        "gemma3_text",
        "gpt_oss",
        "llama",
        "mistral",
        "qwen2",
        "qwen2_vl",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_moe",
    }
)
"""Families whose code rotates the whole head, whatever the config says of a rotary width."""

LONGROPE_MSCALES = frozenset({"phimoe"})
"""Families whose code reads `short_mscale` and `long_mscale`."""

_SECTIONED_16_24_24 = ((16, 24, 24), False)
_SECTIONED_8_12_12 = ((8, 12, 12), False)
_INTERLEAVED_24_20_20 = ((24, 20, 20), True)
_INTERLEAVED_11_11_10 = ((11, 11, 10), True)

MROPE: dict[str, tuple[tuple[int, int, int], bool]] = {
    "qwen2_vl": _SECTIONED_16_24_24,
    "qwen2_vl_text": _SECTIONED_16_24_24,
    "qwen2_5_vl": _SECTIONED_16_24_24,
    "qwen2_5_vl_text": _SECTIONED_16_24_24,
    "qwen2_5_omni_text": _SECTIONED_16_24_24,
    "qwen2_5_omni_talker": _SECTIONED_16_24_24,
    "paddleocr_vl_text": _SECTIONED_16_24_24,
    "glm4v_text": _SECTIONED_8_12_12,
    "glm4v_moe_text": _SECTIONED_8_12_12,
    "glm_image_text": _SECTIONED_8_12_12,
    "glm_ocr_text": _SECTIONED_8_12_12,
    "cosmos3_edge_text": _INTERLEAVED_24_20_20,
    "cohere_compass_text": _INTERLEAVED_24_20_20,
    "qwen3_vl_text": _INTERLEAVED_24_20_20,
    "qwen3_vl_moe_text": _INTERLEAVED_24_20_20,
    "qwen3_omni_moe_text": _INTERLEAVED_24_20_20,
    "qwen3_omni_moe_talker_text": _INTERLEAVED_24_20_20,
    "qwen3_5_text": _INTERLEAVED_11_11_10,
    "qwen3_5_moe_text": _INTERLEAVED_11_11_10,
    "qwen4_exp_text": _INTERLEAVED_11_11_10,
}
"""Families with M-RoPE: the section when the config has none, and whether streams alternate."""

PARTIAL_ROTARY_FACTOR: dict[str, float] = {
    "bamba": 0.5,
    "glm": 0.5,
    "glm4": 0.5,
    "glm4_moe": 0.5,
    "glm4v_moe_text": 0.5,
    "gpt_neox": 0.25,
    "mimo_v2_flash": 0.334,
    "moonshine": 0.9,
    "nemotron": 0.5,
    "persimmon": 0.5,
    "phi": 0.5,
    "qwen3_5_text": 0.25,
    "qwen3_5_moe_text": 0.25,
    "qwen3_next": 0.25,
    "recurrent_gemma": 0.5,
    "stablelm": 0.25,
}
"""The part of a head that rotates when the config does not say; elsewhere all of it."""

FIXED_THETA = {"codegen": 10000.0, "gptj": 10000.0}
"""Families whose base stands in the code and not in the config."""

REFUSED: dict[str, str] = {
    "ernie4_5_vl_moe": "its height and width frequencies alternate, its temporal ones follow",
    "ernie4_5_vl_moe_text": "its height and width frequencies alternate, its temporal ones follow",
    "hunyuan_vl": "the two dims of a pair follow different positions",
    "hunyuan_vl_text": "the two dims of a pair follow different positions",
    "nanochat": "it rotates by the negative angle",
    "neomme": "its positions are rows and columns",
}
"""Families whose rotation no config of ropool describes, and why."""
