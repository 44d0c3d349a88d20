"""Models with multi-head latent attention: what their pools hold and which op fills them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import tiny
from engine.bytes_tokenizer import END_ID
from engine.test_families import NEW_TOKENS, PARAMS, TOLERANCE
from engine.test_generate_cli import as_json
from engine.tiny_files import write_directory
from ropool.dispatch import cache as dispatch_cache
from ropool.dispatch import chosen
from ropool.engine import CacheScales, Engine, Request, SamplingParams
from ropool.engine.pools import CacheDtype
from ropool.integrations.transformers import PooledModel
from ropool.integrations.transformers import mla as mla_module
from ropool.kvcache import MLAFormat, MLAPool

NAMES = ["deepseek_v2", "deepseek_v3"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize("name", NAMES)
def test_the_pool_holds_latent_rows_and_nothing_else(name: str) -> None:
    model = tiny.build(name)
    engine = Engine(PooledModel(model), pool_tokens=128)
    dispatch_cache.clear()
    engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
    assert chosen.keys() == {"rope_store_mla_"}
    config = model.config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    expanded = 2 * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    assert width < expanded
    (pool,) = engine.cache.pools.values()
    assert isinstance(pool, MLAPool) and not engine.cache.layers
    for layer in engine.cache.latent_layers:
        assert layer.rows.shape == (128 // 16, 16, width)
    assert engine.cache.bytes_per_token == config.num_hidden_layers * width * 4
    assert engine.cache.window_bytes_per_token == 0


@pytest.mark.parametrize("name", NAMES)
def test_one_op_call_a_layer_and_no_other_rotation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(name)
    library = __import__(type(model).__module__, fromlist=["_"])
    calls = 0
    op = mla_module.rope_store_mla_

    def count(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        op(*args, **kwargs)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rotated a second time, or expanded")

    pooled = PooledModel(model)
    monkeypatch.setattr(mla_module, "rope_store_mla_", count)
    for rotation in ("apply_rotary_emb", "apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"):
        monkeypatch.setattr(library, rotation, refuse, raising=False)
    monkeypatch.setattr(model.base_model.rotary_emb, "forward", refuse)
    Engine(pooled, pool_tokens=64).generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
    assert calls == 4 * model.config.num_hidden_layers


def test_nan_in_a_free_page_reaches_nobody(device: str) -> None:
    model = tiny.build("deepseek_v3").to(device)
    engine = Engine(PooledModel(tiny.copy_of(model)), pool_tokens=256)
    for layer in engine.cache.latent_layers:
        layer.rows.fill_(torch.nan)
    prompts = tiny.prompts(3, longest=40, seed=3)
    for prompt, request in zip(prompts, engine.generate(prompts, PARAMS), strict=True):
        assert request.output == tiny.greedy(model, prompt, NEW_TOKENS)[0]


SCALE = 0.125
"""A power of two: dividing by it and multiplying by its inverse are the same."""
WIDE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    "dtype, changes", [(E4M3, {}), (E5M2, {}), (MLAFormat.FP8_DS_MLA, WIDE)], ids=str
)
def test_an_fp8_pool_is_the_exact_one_rounded(
    dtype: CacheDtype,
    changes: dict[str, Any],
    device: str,
    logits_of: dict[Request, list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = PooledModel(tiny.build("deepseek_v3", **changes).to(device))
    prompts = tiny.prompts(4, longest=60, seed=2)
    scales = CacheScales((torch.full((len(model.spec.windows),), SCALE),))

    def generate(dtype: CacheDtype | None) -> Sequence[Request]:
        # Preempted and resumed, in chunks.
        engine = Engine(
            model,
            pool_tokens=160,
            cache_dtype=dtype,
            cache_scales=scales if isinstance(dtype, torch.dtype) else None,
            max_batch_tokens=32,
            max_requests=4,
        )
        requests = engine.generate(prompts, PARAMS)
        assert engine.scheduler.preemptions > 0
        return requests

    stored = generate(dtype)
    op = mla_module.rope_store_mla_

    def store_and_round(*args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)
        rows, slots = args[3].flatten(0, 1), args[6]
        rows[slots] = rounded(rows[slots], dtype)

    monkeypatch.setattr(mla_module, "rope_store_mla_", store_and_round)
    for ours, theirs in zip(stored, generate(None), strict=True):
        assert ours.output == theirs.output
        torch.testing.assert_close(
            torch.stack(logits_of[ours]), torch.stack(logits_of[theirs]), **TOLERANCE[torch.float32]
        )


def rounded(rows: Tensor, dtype: CacheDtype) -> Tensor:
    """Float32 rows `[T, L + R]` as the format keeps them."""
    if isinstance(dtype, torch.dtype):
        return (rows / SCALE).to(dtype).float() * SCALE
    latent, rope = rows.split([512, 64], -1)
    tiles = latent.unflatten(-1, (4, 128))
    largest = tiles.abs().amax(-1, keepdim=True)
    # By a tensor: PyTorch multiplies by the inverse of a number on a GPU, which rounds otherwise.
    scale = largest / torch.full_like(largest, 448.0)
    tiles = (tiles / scale).to(E4M3).float() * scale
    return torch.cat([tiles.flatten(-2), rope.bfloat16().float()], -1)


def test_the_cli_generates_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(write_directory(tmp_path, "deepseek_v3"))
    options = ["--model", directory, "--max-new-tokens", "6"]
    report = as_json(capsys, "Hi", "there", *options)
    assert report["kernels"].keys() == {"rope_store_mla_"}
    assert report["pool"]["bytes_per_token"] == 2 * (40 + 8) * 4
    assert report["pool"]["window_bytes_per_token"] == 0
    for output in report["outputs"]:
        assert len(output["tokens"]) == 6 or output["tokens"][-1] == END_ID
    report = as_json(capsys, "Hi", *options, "--kv-cache-dtype", "fp8_e4m3")
    assert report["pool"]["bytes_per_token"] == 2 * (40 + 8)


def test_many_short_requests_decode_together(device: str) -> None:
    """So many queries over so few keys that one request's would be expanded."""
    model = tiny.build("deepseek_v2").to(device)
    prompts = tiny.prompts(48, longest=9, seed=6)
    engine = Engine(PooledModel(tiny.copy_of(model)), pool_tokens=48 * 16)
    requests = engine.generate(prompts, SamplingParams(max_new_tokens=3))
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output == tiny.greedy(model, prompt, 3)[0]
