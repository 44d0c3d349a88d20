"""Pair styles and M-RoPE streams of model families, against the families' own rotation: attention
scores after `ropool.rope_` equal those after theirs, and differ with the other pair style."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ropool
from ropool.rotary import RotaryConfig, RotaryEmbedding, families
from rotary.hf_oracle import modeling

T, D = 24, 32
SMALL = {"hidden_size": 4 * D, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": D}
MROPE_RANGES = ((0, 24), (0, 6), (7, 15))


def family_config(name: str) -> tuple[Any, str, str]:
    """A small config of a family, and the names of its rotary class and its rotation."""
    rotate = "apply_rotary_pos_emb"
    match name:
        case "deepseek_v3" | "youtu":
            prefix = {"deepseek_v3": "DeepseekV3", "youtu": "Youtu"}[name]
            make = getattr(transformers, f"{prefix}Config")
            sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
            config = make(**sizes, qk_rope_head_dim=D)
            return config, f"{prefix}RotaryEmbedding", f"{rotate}_interleave"
        case "llama4":
            config = transformers.Llama4TextConfig(**SMALL)
            return config, "Llama4TextRotaryEmbedding", "apply_rotary_emb"
        case _:
            prefix = {"gpt_neox": "GPTNeoX", "ernie4_5": "Ernie4_5", "stablelm": "StableLm"}.get(
                name, name.capitalize()
            )
            make = getattr(transformers, f"{prefix}Config")
            return make(**SMALL), f"{prefix}RotaryEmbedding", rotate


def heads(seed: int) -> torch.Tensor:
    return torch.randn(T, 4, D, generator=torch.Generator().manual_seed(seed))


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("thd,shd->hts", q.double(), k.double())


def ours(rope: RotaryEmbedding, positions: torch.Tensor) -> torch.Tensor:
    q, k = heads(0), heads(1)
    ropool.rope_(q, k, rope.cos_sin_cache, positions, **rope.options, backend="reference")
    return scores(q, k)


@pytest.mark.parametrize(
    ("name", "interleaved"),
    [
        ("llama", False),
        ("gpt_neox", False),
        ("stablelm", False),
        ("phi", False),
        ("glm", True),
        ("cohere", True),
        ("ernie4_5", True),
        ("helium", True),
        ("llama4", True),
        ("deepseek_v3", True),
        ("youtu", True),
    ],
)
def test_pairs_of_a_family(name: str, interleaved: bool) -> None:
    config, rotary, rotate = family_config(name)
    module = getattr(modeling(name), rotary)(config)
    positions = torch.arange(T)
    angles = module(torch.empty(1), positions[None])
    q, k = heads(0), heads(1)
    if name == "llama4":
        theirs = getattr(modeling(name), rotate)(q[None], k[None], angles)
        expected = scores(theirs[0][0], theirs[1][0])
    else:
        width = angles[0].shape[-1]
        turned = [q[..., :width], k[..., :width]]
        first = [part.transpose(0, 1)[None] for part in turned]
        theirs = getattr(modeling(name), rotate)(*first, *angles)
        rest = [q[..., width:], k[..., width:]]
        expected = scores(
            *(
                torch.cat((part[0].transpose(0, 1), passed), dim=-1)
                for part, passed in zip(theirs, rest, strict=True)
            )
        )
    read = RotaryConfig.from_hf(config)
    assert read.interleaved is interleaved
    assert read.rotary_dim == (angles.shape[-1] * 2 if name == "llama4" else angles[0].shape[-1])
    read = dataclasses.replace(read, head_dim=D)
    actual = ours(RotaryEmbedding(read, T), positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    other = dataclasses.replace(read, interleaved=not interleaved)
    assert (ours(RotaryEmbedding(other, T), positions) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "prefix", "section", "partial"),
    [
        ("qwen2_vl", "Qwen2VL", [4, 6, 6], 1.0),
        ("qwen2_5_vl", "Qwen2_5_VL", [4, 6, 6], 1.0),
        ("qwen3_vl", "Qwen3VLText", [6, 5, 5], 1.0),
        ("qwen3_5", "Qwen3_5Text", [4, 2, 2], 0.5),
        ("glm4v", "Glm4vText", [2, 3, 3], 0.5),
    ],
)
def test_streams_of_a_family(family: str, prefix: str, section: list[int], partial: float) -> None:
    make = getattr(transformers, f"{prefix.removesuffix('Text')}TextConfig")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
    config = make(**SMALL, rope_parameters={**rope, "partial_rotary_factor": partial})
    code = modeling(family)
    module = getattr(code, f"{prefix}RotaryEmbedding")(config)
    generator = torch.Generator().manual_seed(2)
    streams = [torch.randint(low, high, (T,), generator=generator) for low, high in MROPE_RANGES]
    positions = torch.stack(streams)
    cos, sin = module(torch.empty(1), positions[:, None])
    read = RotaryConfig.from_hf(config)
    assert read.mrope_section == tuple(section)
    assert read.rotary_dim == int(D * partial) == cos.shape[-1]

    q, k = (tensor.transpose(0, 1)[None] for tensor in (heads(0), heads(1)))
    rotate = code.apply_rotary_pos_emb
    assert "mrope_section" not in inspect.signature(rotate).parameters
    theirs = rotate(q, k, cos, sin)
    expected = scores(*(part[0].transpose(0, 1) for part in theirs))
    actual = ours(RotaryEmbedding(read, 32), positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    # The other way to deal out the frequencies gives other scores.
    other = dataclasses.replace(read, mrope_interleaved=not read.mrope_interleaved)
    assert (ours(RotaryEmbedding(other, 32), positions) - expected).abs().max() > 0.1


def model_types(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("configuration_*.py"):
        found |= set(re.findall(r'^    model_type = "(\w+)"', file.read_text(), re.MULTILINE))
    return found


# No decoders: vision and matching models, and a classifier.
NOT_READ = {"edgetam_video", "efficientloftr", "inkling2", "lightglue", "musicflamingo"}
NOT_READ |= {"openai_privacy_filter", "sam2_video", "sam3", "sam3_tracker_video"}
INTERLEAVED_CODE = re.compile(
    r"^def (rotate_half\w*|rotate_every_two|rotate_pairwise)\([^)]*\)[^\n]*\n"
    r"(?:(?!^\S).)*?(::2\]|\.reshape\(\*x\.shape\[:-1\], -1, 2\)|-1, 2\))"
    r"|^def apply_rotary_pos_emb_interleave\(|torch\.view_as_complex\(xq",
    re.MULTILINE | re.DOTALL,
)


def test_no_interleaved_family_is_missing() -> None:
    """Every family of transformers whose code turns `(2i, 2i+1)` is listed, and no other is."""
    root = Path(transformers.__file__).parent / "models"
    listed = families.INTERLEAVED_PAIRS | families.REFUSED.keys()
    interleaved: set[str] = set()
    for file in root.glob("*/modeling_*.py"):
        if INTERLEAVED_CODE.search(file.read_text()) and file.parent.name not in NOT_READ:
            types = model_types(file.parent)
            assert types & listed, f"{file.parent.name} turns interleaved pairs"
            interleaved |= types
    assert len(interleaved) > 30
    # kimi_k2 stands in no release of transformers: its code is DeepSeek's.
    assert families.INTERLEAVED_PAIRS - interleaved == {"kimi_k2"}


def test_the_option_is_read_where_their_code_reads_it() -> None:
    assert not RotaryConfig.from_hf(
        transformers.DeepseekV3Config(rope_interleave=False)
    ).interleaved
    assert RotaryConfig.from_hf(transformers.DeepseekV3Config()).interleaved
    assert RotaryConfig.from_hf(transformers.DeepseekV2Config(rope_interleave=False)).interleaved
    assert not RotaryConfig.from_hf(transformers.LlamaConfig(rope_interleave=True)).interleaved


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (families.INTERLEAVE_OPTION, "config.rope_interleave"),
        (families.LONGROPE_MSCALES, '"short_mscale"'),
    ],
)
def test_who_reads_an_option(listed: frozenset[str], words: str) -> None:
    root = Path(transformers.__file__).parent / "models"
    readers: set[str] = set()
    for file in root.glob("*/modeling_*.py"):
        if words in file.read_text():
            readers |= model_types(file.parent)
    assert readers == listed


def test_who_rotates_the_whole_head() -> None:
    for family in families.WHOLE_HEAD:
        code = modeling(family.removesuffix("_text")).__file__
        assert not re.search("partial_rotary|rotary_pct|rotary_dim", Path(code).read_text())
