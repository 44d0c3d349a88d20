"""Reading Hugging Face configs: objects, saved dicts and older `config.json` files say the same;
what cannot be expressed is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers

from ropool.rotary import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RotaryConfig,
    YarnScaling,
)
from rotary.hf_oracle import DEEPSEEK_YARN, LONG, SHORT, Case, cases

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 1152,
    "num_attention_heads": 12,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "pad_token_id": 0,
}
PHI = {**LLAMA, "model_type": "phi"}  # its code reads a rotary width
QWEN2_VL = {**LLAMA, "model_type": "qwen2_vl_text"}
PLAIN = RotaryConfig(head_dim=128, rotary_dim=128, theta=500000.0, max_position=131072)


def scaled(scaling: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**LLAMA, "rope_scaling": scaling, **changes}


# Older forms of config.json, and what they mean.
OLDER: list[tuple[str, dict[str, Any], str | None, RotaryConfig]] = [
    ("plain", LLAMA, None, PLAIN),
    ("null", {**LLAMA, "rope_scaling": None, "head_dim": None}, None, PLAIN),
    (
        "head-dim",
        {**LLAMA, "head_dim": 64},
        None,
        dataclasses.replace(PLAIN, head_dim=64, rotary_dim=64),
    ),
    (
        "linear",
        scaled({"type": "linear", "factor": 4}),
        None,
        dataclasses.replace(PLAIN, scaling=LinearScaling(factor=4)),
    ),
    (
        "dynamic",
        scaled({"type": "dynamic", "factor": 2.0}),
        None,
        dataclasses.replace(
            PLAIN, scaling=DynamicNTKScaling(factor=2.0, original_max_position=131072)
        ),
    ),
    (
        "llama3",
        scaled(
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        ),
        None,
        dataclasses.replace(
            PLAIN,
            scaling=Llama3Scaling(
                factor=8.0, original_max_position=8192, low_freq_factor=1.0, high_freq_factor=4.0
            ),
        ),
    ),
    (
        "yarn",
        scaled({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
        None,
        dataclasses.replace(PLAIN, scaling=YarnScaling(factor=4.0, original_max_position=32768)),
    ),
    (
        "deepseek",
        scaled(
            {name: value for name, value in DEEPSEEK_YARN.items() if name != "rope_type"}
            | {"type": "yarn"},
            model_type="deepseek_v3",
            qk_rope_head_dim=64,
        ),
        None,
        dataclasses.replace(
            PLAIN,
            head_dim=64,
            rotary_dim=64,
            interleaved=True,
            scaling=YarnScaling(
                factor=40.0,
                original_max_position=4096,
                beta_fast=32,
                beta_slow=1,
                mscale=1.0,
                mscale_all_dim=0.6,
            ),
        ),
    ),
    (
        "longrope",
        {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}},
        None,
        RotaryConfig(
            head_dim=96,
            rotary_dim=96,
            theta=10000.0,
            max_position=131072,
            scaling=LongRopeScaling(
                short_factor=tuple(SHORT),
                long_factor=tuple(LONG),
                original_max_position=4096,
                factor=32.0,
            ),
        ),
    ),
    (
        "gpt-neox",
        {
            "model_type": "gpt_neox",
            "hidden_size": 1024,
            "num_attention_heads": 8,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "rotary_emb_base": 20000,
        },
        None,
        RotaryConfig(head_dim=128, rotary_dim=32, theta=20000, max_position=2048),
    ),
    (
        "glm",
        {**LLAMA, "model_type": "glm", "head_dim": 128},
        None,
        dataclasses.replace(PLAIN, rotary_dim=64, interleaved=True),
    ),
    (
        "gptj",
        {
            "model_type": "gptj",
            "n_embd": 4096,
            "n_head": 16,
            "n_positions": 2048,
            "rotary_dim": 64,
        },
        None,
        RotaryConfig(
            head_dim=256, rotary_dim=64, theta=10000.0, max_position=2048, interleaved=True
        ),
    ),
    (
        "qwen2-vl",
        {**QWEN2_VL, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        None,
        dataclasses.replace(PLAIN, mrope_section=(16, 24, 24)),
    ),
    (
        "qwen3-vl",
        {
            **LLAMA,
            "model_type": "qwen3_vl_text",
            "head_dim": 128,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        None,
        dataclasses.replace(PLAIN, mrope_section=(24, 20, 20), mrope_interleaved=True),
    ),
    (
        "gemma3-global",
        {
            **LLAMA,
            "model_type": "gemma3_text",
            "head_dim": 256,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "full_attention",
        dataclasses.replace(PLAIN, head_dim=256, rotary_dim=256, scaling=LinearScaling(factor=8.0)),
    ),
    (
        "gemma3-local",
        {
            **LLAMA,
            "model_type": "gemma3_text",
            "head_dim": 256,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "sliding_attention",
        dataclasses.replace(PLAIN, head_dim=256, rotary_dim=256, theta=10000.0),
    ),
]
BY_NAME = pytest.mark.parametrize(
    ("older", "layer_type", "expected"), [entry[1:] for entry in OLDER], ids=[e[0] for e in OLDER]
)


@BY_NAME
def test_older_dicts(older: dict[str, Any], layer_type: str | None, expected: RotaryConfig) -> None:
    assert RotaryConfig.from_hf(older, layer_type) == expected


@BY_NAME
def test_config_objects_made_from_older_dicts(
    older: dict[str, Any], layer_type: str | None, expected: RotaryConfig
) -> None:
    config = transformers.AutoConfig.for_model(**older)
    assert RotaryConfig.from_hf(config, layer_type) == expected


@pytest.mark.parametrize("case", cases(), ids=str)
def test_saved_configs(case: Case) -> None:
    saved = case.config.to_dict()
    expected = RotaryConfig.from_hf(case.config, case.layer_type)
    assert RotaryConfig.from_hf(saved, case.layer_type) == expected
    assert hash(RotaryConfig.from_hf(saved, case.layer_type)) == hash(expected)


def test_the_text_model_of_a_multimodal_config_is_read() -> None:
    whole = {"model_type": "qwen2_vl", "vision_config": {"head_dim": 7}, "text_config": QWEN2_VL}
    assert RotaryConfig.from_hf(whole) == dataclasses.replace(PLAIN, mrope_section=(16, 24, 24))
    config = transformers.Gemma3Config(text_config={"head_dim": 64})
    assert RotaryConfig.from_hf(config, "sliding_attention").head_dim == 64


def test_layers_with_a_head_dim_of_their_own() -> None:
    config = transformers.Gemma4TextConfig(head_dim=128, global_head_dim=384)
    for form in (config, config.to_dict()):
        local = RotaryConfig.from_hf(form, "sliding_attention")
        world = RotaryConfig.from_hf(form, "full_attention")
        assert (local.head_dim, local.scaling) == (128, None)
        assert (world.head_dim, world.rotary_dim) == (384, 384)
        assert world.scaling == ProportionalScaling(rotated_pairs=48)


def test_longrope_by_its_older_name() -> None:
    lists = {"short_factor": SHORT, "long_factor": LONG}
    older, newer = ({**PHI3, "rope_scaling": {**lists, "type": t}} for t in ("su", "longrope"))
    assert RotaryConfig.from_hf(older) == RotaryConfig.from_hf(newer)


def test_an_original_length_beside_the_rope_dict_goes_first() -> None:
    scaling = {"short_factor": SHORT, "long_factor": LONG, "type": "longrope"}
    older = {**PHI3, "rope_scaling": {**scaling, "original_max_position_embeddings": 8192}}
    for form in (older, transformers.AutoConfig.for_model(**older)):
        read = RotaryConfig.from_hf(form).scaling
        assert isinstance(read, LongRopeScaling)
        assert (read.original_max_position, read.factor) == (4096, 32.0)


def test_attention_factors_of_longrope() -> None:
    lists = {"short_factor": SHORT, "long_factor": LONG, "type": "longrope"}
    read = RotaryConfig.from_hf({**PHI3, "rope_scaling": {**lists, "attention_factor": 1.2}})
    assert isinstance(read.scaling, LongRopeScaling)
    assert (read.scaling.short_attention_factor, read.scaling.long_attention_factor) == (1.2, 1.2)
    mscales = {"short_mscale": 1.1, "long_mscale": 1.3}
    for family, expected in (("phimoe", (1.1, 1.3)), ("phi3", (None, None))):
        older = {**PHI3, "model_type": family, "rope_scaling": {**lists, **mscales}}
        read = RotaryConfig.from_hf(older)
        assert isinstance(read.scaling, LongRopeScaling)
        factors = (read.scaling.short_attention_factor, read.scaling.long_attention_factor)
        assert factors == expected


YARN = {"type": "yarn", "factor": 4.0}
NESTED = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": None, "other": {}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (scaled({"type": "ntk", "factor": 2.0}), r"rope_type is 'ntk'; allowed: default, dynamic, lin"),
    (scaled({"rope_type": "axial"}), r"rope_type is 'axial'; allowed: default, .*, yarn"),
    # Hunyuan's fixed alpha goes by the name of dynamic NTK.
    (scaled({"type": "dynamic", "factor": 1.0, "alpha": 1e3}), r"alpha is 1000.0, with rope_type"),
    (scaled({"type": "linear", "factor": 2.0, "beta_fast": 32}), r"beta_fast is 32"),
    (scaled({"type": "default", "factor": 2.0}), r"factor is 2.0"),
    (scaled({**YARN, "attn_factor": 2.0}), r"attn_factor is 2.0, with rope_type 'yarn'; allowed"),
    (scaled({"type": "linear"}), r"factor is missing; allowed: a value, with rope_type 'linear'"),
    (scaled({"type": "linear", "factor": 0.5}), r"LinearScaling: factor is 0.5; allowed"),
    (scaled({"type": "linear", "factor": "2"}), r"LinearScaling: factor is '2'; allowed"),
    (
        scaled(
            {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096},
        ),
        r"original_max_position_embeddings is 4096; allowed: .*\(131072\)",
    ),
    (scaled({**YARN, "truncate": 1}), r"YarnScaling: truncate is 1; allowed: True, False"),
    (scaled({**YARN, "beta_fast": 0.5}), r"beta_fast is 0.5; allowed: above beta_slow \(1.0\)"),
    (scaled({"rope_type": "llama3", "factor": 8.0}), r"low_freq_factor is missing"),
    (
        {**PHI3, "rope_scaling": {"type": "su", "short_factor": SHORT[1:], "long_factor": LONG}},
        r"short_factor is .*; allowed: R/2 \(48\) numbers, not 47",
    ),
    (
        {**PHI3, "rope_scaling": {"type": "su", "short_factor": 1.0, "long_factor": LONG}},
        r"short_factor is 1.0; allowed: a list",
    ),
    ({**PHI3, "rope_scaling": {"type": "yarn", "factor": 2.0, "short_factor": SHORT}}, r"short_f"),
    ({**LLAMA, "rope_theta": None}, r"rope_theta is missing"),
    ({**LLAMA, "rope_theta": "1e4"}, r"theta is '1e4'; allowed: a finite number above 1"),
    ({**LLAMA, "rope_scaling": "linear"}, r"the rope parameters are 'linear'; allowed: a dict"),
    ({**LLAMA, "swa_rope_theta": 1e4}, r"swa_rope_theta is 10000.0; allowed: a base for each"),
    ({**LLAMA, "hidden_size": 1000, "num_attention_heads": 3}, r"head_dim is missing"),
    ({"model_type": "llama", "rope_theta": 1e4}, r"head_dim is missing"),
    ({**PHI, "partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1.5; allowed: a number"),
    ({**PHI, "partial_rotary_factor": 0.2}, r"rotary_dim is 25; allowed: an even integer"),
    ({**PHI, "partial_rotary_factor": 0.5, "rotary_dim": 32}, r"agrees with .* width of 32"),
    ({**LLAMA, "model_type": "nanochat"}, r"model_type is 'nanochat'; .* negative angle"),
    ({**LLAMA, "model_type": "ernie4_5_vl_moe_text"}, r"model_type is 'ernie4_5_vl_moe_text'"),
    ({**LLAMA, "rope_parameters": NESTED}, r"layer_type is None; allowed: full_attention, other"),
    (scaled({"type": "mrope"}), r"rope_type is 'mrope'; allowed: with mrope_section only"),
    (scaled({"type": "default", "interleaved": True}), r"interleaved.* is True; allowed: with"),
    ({**QWEN2_VL, "rope_scaling": {"mrope_section": [16, 24]}}, r"mrope_section is \[16, 24\]"),
    ({**QWEN2_VL, "rope_scaling": {"mrope_section": [1, 2, 3]}}, r"sum to R/2 \(64\)"),
    (
        {
            **QWEN2_VL,
            "rope_scaling": {"mrope_section": [16, 24, 24], "mrope_interleaved": True},
        },
        r"mrope_interleaved is True; allowed: False, for qwen2_vl_text",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[entry[1][:40] for entry in REFUSED])
def test_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        RotaryConfig.from_hf(config)
    assert str(raised.value).startswith("ropool.")
    assert "; allowed: " in str(raised.value) or "; ropool cannot: " in str(raised.value)


def test_layer_types() -> None:
    config = {**LLAMA, "rope_parameters": NESTED}
    assert RotaryConfig.from_hf(config, "full_attention") == dataclasses.replace(PLAIN, theta=1e6)
    with pytest.raises(ValueError, match="layer_type is 'nope'; allowed: full_attention, other"):
        RotaryConfig.from_hf(config, "nope")
    with pytest.raises(ValueError, match="'sliding_attention'; those layers have no rotary"):
        RotaryConfig.from_hf(config, "sliding_attention")
    with pytest.raises(ValueError, match="layer_type is None; allowed, as layers differ: full_att"):
        RotaryConfig.from_hf({**transformers.Gemma4TextConfig().to_dict(), "rope_parameters": {}})
    # A model whose layers are alike has one rotation for whichever layer.
    assert RotaryConfig.from_hf(LLAMA, "full_attention") == PLAIN


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("head_dim", 1),
        ("head_dim", 128.0),
        ("rotary_dim", 0),
        ("rotary_dim", 63),
        ("rotary_dim", 130),
        ("theta", 1),
        ("theta", float("inf")),
        ("theta", float("nan")),
        ("scaling", {"factor": 2.0}),
        ("interleaved", 1),
        ("mrope_section", (16, 24)),
        ("mrope_section", [16, 24, 24]),
        ("mrope_section", (16, 24, 25)),
        ("mrope_section", (-1, 40, 25)),
        ("mrope_interleaved", True),
        ("max_position", 0),
        ("rotated_pairs", 65),
    ],
)
def test_options_are_checked(option: str, value: Any) -> None:
    changes = {option: value}
    if option == "rotated_pairs":
        changes = {"scaling": ProportionalScaling(rotated_pairs=value)}
    with pytest.raises(ValueError, match=rf"{option} is .*; allowed: "):
        dataclasses.replace(PLAIN, **changes)


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.theta = 1.0  # type: ignore[misc]
