"""The decode bench on the CPU, with tiny models and without graphs: other kernels in the op's place
give the same logits, and none do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from ropool.bench import decode, decode_kernels
from ropool.cli.main import main

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": {**TINY, "model_type": "llama", "num_key_value_heads": 2},
    "deepseek": {**TINY, "model_type": "deepseek_v3", "first_k_dense_replace": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_other_kernels_do_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(model: object, step: object) -> tuple[Callable[[], None], Tensor]:
        return lambda: None, model.forward(step).clone()  # type: ignore[attr-defined]

    theirs = replace(decode_kernels.KERNELS["transformers"], unavailable=lambda device: None)
    monkeypatch.setitem(decode_kernels.KERNELS, "transformers", theirs)
    monkeypatch.setattr(decode, "MODELS", MODELS)
    monkeypatch.setattr(decode, "NOTHING", "")
    monkeypatch.setattr(decode, "BATCHES", (1, 3))
    monkeypatch.setattr(decode, "CONTEXT", 32)
    monkeypatch.setattr(decode, "captured", eager)
    monkeypatch.setattr(decode, "microseconds", lambda replay: 2.0)
    torch.manual_seed(0)
    rows = list(decode.decode_steps([name], torch.device("cpu"), 1))
    assert [(row.batch, row.kernels) for row in rows] == [
        (batch, kind) for batch in (1, 3) for kind in decode_kernels.KERNELS
    ]
    for row in rows:
        if row.kernels == "transformers":
            assert row.logits_off is not None and row.logits_off < 0.05
            assert row.slower == 0.0
        elif row.kernels == "ropool":
            assert row.logits_off == 0.0 and row.p50_us == 2.0
        elif row.kernels == "none":
            if name == "deepseek":
                assert row.note == "not supported: has no kernel for this model"
            else:
                assert row.logits_off is not None and row.logits_off > 0.2
        else:
            assert row.note == "not supported: runs on NVIDIA GPUs only"
        assert row.kernels in row.line()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--decode", "gpt"], "model 'gpt' is unknown; known: llama-8b"),
        (["--decode", "all", "--device", "cpu"], "--decode needs a CUDA device"),
        (["--suite", "gpu", "--heads", "9x3x64"], "--heads does not go with --suite"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
