"""Loading: the rotation of newer configs reaches `mlx-lm`, which passes `rope_parameters` over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
from mlx_extension.device import use_device  # noqa: E402

use_device()

from transformers import AutoModelForCausalLM  # noqa: E402

from engine import tiny as torch_tiny  # noqa: E402
from engine.bytes_tokenizer import byte_tokenizer  # noqa: E402
from ropool.engine import SamplingParams  # noqa: E402
from ropool.errors import RopoolError  # noqa: E402
from ropool.mlx.engine import MlxEngine  # noqa: E402
from ropool.mlx.load import load  # noqa: E402

GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 32,
    "query_pre_attn_scalar": 20,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 77777.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 555.0},
    },
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
    "llama-bias-llama3": {},
    "qwen2": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    "qwen3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "gemma3": {},
    "mistral-window": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2-some-windows": {},
}
WINDOWS = {
    "mistral-window": (8, 8, 8),
    "phi3": (8, 8, 8),
    "qwen2-some-windows": (None, 18, 18),
}


@pytest.mark.parametrize("name", CHANGES)
def test_answers_are_those_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "gemma3":
        monkeypatch.setitem(torch_tiny.MODELS, name, GEMMA3)
    model = torch_tiny.build(name, **CHANGES[name], vocab_size=258)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    if name == "gemma3":  # mlx-lm reads the pattern, newer configs list the layers
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window_pattern": 3}))
    ours, _ = load(str(tmp_path))
    assert ours.spec.windows == WINDOWS.get(name, (None,) * 3)
    prompt = torch_tiny.prompts(1, longest=60, seed=6)[0]
    engine = MlxEngine(ours, pool_tokens=128)
    request = engine.generate([prompt], SamplingParams(max_new_tokens=16))[0]
    expected = torch_tiny.greedy(AutoModelForCausalLM.from_pretrained(tmp_path), prompt, 16)[0]
    assert request.output == expected


def test_windows_that_mlx_lm_has_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_tiny.MODELS, "gemma3", GEMMA3)
    torch_tiny.build("gemma3", vocab_size=258).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RopoolError, match=r"windows \[512, 512, None\] by the model's config"):
        load(str(tmp_path))
