"""On an NVIDIA GPU: the tokens of `transformers` on the CPU, and no layer waits for the device."""

from __future__ import annotations

import pytest
import torch

from engine import tiny
from ropool.engine import Engine, SamplingParams
from ropool.engine.step import Step
from ropool.integrations.transformers.model import PooledModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Unsynchronised(PooledModel):
    """A model whose forward pass fails where the host would wait for the device."""

    def forward(self, step: Step) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return super().forward(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["llama-9x3-tied", "qwen2-some-windows", "qwen3"])
def test_ragged_batches_agree_with_transformers(name: str) -> None:
    model = tiny.build(name)
    prompts = tiny.prompts(8, longest=70)
    engine = Engine(
        Unsynchronised(tiny.copy_of(model).cuda()),
        pool_tokens=192,
        max_requests=5,
        max_batch_tokens=23,
    )
    requests = engine.generate(prompts, SamplingParams(max_new_tokens=24))
    assert engine.scheduler.preemptions > 0
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output == tiny.greedy(model, prompt, 24)[0]
    engine.cache.allocator.check_no_leak()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_and_fp8_pools_run(dtype: torch.dtype) -> None:
    model = Unsynchronised(tiny.build("llama").to("cuda", dtype))
    for cache_dtype in (None, torch.float8_e4m3fn, torch.float8_e5m2):
        engine = Engine(model, pool_tokens=256, cache_dtype=cache_dtype)
        params = SamplingParams(max_new_tokens=8, temperature=0.8, top_p=0.9)
        for request in engine.generate(tiny.prompts(3, longest=40), params):
            assert len(request.output) == 8
