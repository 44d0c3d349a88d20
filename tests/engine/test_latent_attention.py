"""Attention over latent rows, absorbed or expanded, against K and V expanded in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from engine.test_memory import DS_MLA, E4M3, E5M2, spec_of
from oracle.formats import decode
from ropool.engine import latent
from ropool.engine.cache import KVCache, PageTable
from ropool.engine.pools import CacheDtype
from ropool.engine.scales import CacheScales
from ropool.engine.spec import LatentRow
from ropool.engine.step import Span, build_step
from ropool.integrations.transformers.mla import LatentAttention
from ropool.rotary import RotaryConfig, StackedRotary, cos_sin_cache

HEADS, NOPE, VALUE, LATENT, ROPE, HIDDEN = 6, 128, 96, 512, 64, 160
CONTEXT = 400
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 100,
    "mscale": 0.8,
    "mscale_all_dim": 1.2,
}
# Each step computes some tokens of some requests: chunks, neighbours that decode together, one that
# joins late, one that decodes beside a chunk.
STEPS: list[dict[int, int]] = [
    {0: 90},
    {0: 1, 1: 33},
    {1: 17, 2: 150},
    {0: 1, 1: 1, 2: 1},
    {0: 1, 2: 1, 1: 1, 3: 5},
    {2: 140, 3: 1},
]


def module_of(**changes: Any) -> DeepseekV3Attention:
    """The attention of a model with the widths of a large one, and random weights that make it
    choose."""
    settings = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "kv_lora_rank": LATENT,
        "q_lora_rank": None,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": YARN,
    }
    module = DeepseekV3Attention(DeepseekV3Config(**settings | changes), layer_idx=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                gain = 2.5 if "q_" in name else 1.0
                parameter.normal_(0.0, gain / parameter.shape[1] ** 0.5, generator=generator)
            else:
                parameter.normal_(1.0, 0.3, generator=generator)
    return module.requires_grad_(False)


def linear(x: Tensor, projection: Any) -> Tensor:
    y = x @ projection.weight.double().T
    return y if projection.bias is None else y + projection.bias.double()


def norm(x: Tensor, module: Any) -> Tensor:
    root = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    return x / root * module.weight.double()


def rotate(x: Tensor, config: RotaryConfig) -> Tensor:
    """`x` `[T, ..., R]` of positions 0 to `T - 1`."""
    halves = cos_sin_cache(config, len(x)).double().chunk(2, -1)
    cos, sin = (half.reshape(len(x), *(1,) * (x.dim() - 2), -1) for half in halves)
    out = torch.empty_like(x)
    pairs = [slice(0, None, 2), slice(1, None, 2)]
    if not config.interleaved:
        pairs = [slice(0, ROPE // 2), slice(ROPE // 2, None)]
    first, second = (x[..., pair] for pair in pairs)
    out[..., pairs[0]], out[..., pairs[1]] = (
        first * cos - second * sin,
        second * cos + first * sin,
    )
    return out


def rows_of(module: Any, hidden: Tensor, config: RotaryConfig) -> Tensor:
    """The latent rows `[T, L + R]` of one request, in float64."""
    latent, k_rope = linear(hidden, module.kv_a_proj_with_mqa).split([LATENT, ROPE], -1)
    return torch.cat([norm(latent, module.kv_a_layernorm), rotate(k_rope, config)], -1)


def expanded(module: Any, hidden: Tensor, rows: Tensor, config: RotaryConfig) -> Tensor:
    """Attention of one request with K and V `[T, Hq, ...]` of every head, in float64."""
    if module.q_lora_rank is None:
        q = linear(hidden, module.q_proj)
    else:
        q = linear(norm(linear(hidden, module.q_a_proj), module.q_a_layernorm), module.q_b_proj)
    q_nope, q_rope = q.unflatten(-1, (HEADS, -1)).split([NOPE, ROPE], -1)
    latent, k_rope = rows.split([LATENT, ROPE], -1)
    k_nope, v = linear(latent, module.kv_b_proj).unflatten(-1, (HEADS, -1)).split([NOPE, VALUE], -1)
    q = torch.cat([q_nope, rotate(q_rope, config)], -1)
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, HEADS, -1)], -1)
    mscale = 0.1 * YARN["mscale_all_dim"] * torch.tensor(YARN["factor"]).double().log() + 1
    scores = torch.einsum("thd,shd->hts", q, k) * mscale**2 / (NOPE + ROPE) ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return linear(torch.einsum("hts,shd->thd", weights, v).flatten(1), module.o_proj)


def run(
    module: Any, hidden: Sequence[Tensor], dtype: CacheDtype | None, scale: float | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and pool rows of each request after `STEPS`."""
    config = RotaryConfig.from_hf(module.config)
    attention = LatentAttention(module, 0, StackedRotary(config, CONTEXT))
    spec = spec_of(LatentRow(LATENT, ROPE), (None,), torch.float32)
    cache = KVCache(spec, pool_tokens=512, max_requests=4, max_batch_tokens=256, dtype=dtype)
    if scale is not None:
        cache.set_scales(CacheScales((torch.tensor([scale]),)))
    tables = [PageTable() for _ in hidden]
    done = [0] * len(hidden)
    outputs: list[list[Tensor]] = [[] for _ in hidden]
    for step in STEPS:
        spans = []
        for request, count in step.items():
            start = done[request]
            assert cache.reserve(tables[request], start, start + count)
            positions = [range(start, start + count)]
            spans.append(Span([0] * count, start, tables[request], False, positions, []))
            done[request] += count
        parts = [
            hidden[request][span.start : span.end]
            for request, span in zip(step, spans, strict=True)
        ]
        out, _ = attention(torch.cat(parts)[None], step=build_step(spans, cache))
        for request, part in zip(step, out[0].split([len(p) for p in parts]), strict=True):
            outputs[request].append(part)
    rows = cache.latent_layers[0].rows
    held = [rows[t.pages].flatten(0, 1)[:n] for t, n in zip(tables, done, strict=True)]
    return [torch.cat(parts) for parts in outputs], held


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    counts = [sum(step.get(request, 0) for step in STEPS) for request in range(4)]
    return [torch.randn(count, HIDDEN, generator=generator) for count in counts]


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "query-rank": {"q_lora_rank": 80},
    "bias": {"q_lora_rank": 80, "attention_bias": True},
    "neox": {"rope_interleave": False},
}


@pytest.mark.parametrize("name", MODULES)
def test_attention_is_the_expanded_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some heads at a time, the last ones fewer.
    monkeypatch.setattr(latent, "EXPANDED_ELEMENTS", 4 * 150 * 2 * (NOPE + ROPE))
    module = module_of(**MODULES[name])
    config = RotaryConfig.from_hf(module.config)
    assert config.interleaved == (name != "neox")
    hidden = inputs()
    outputs, held = run(module, hidden, None)
    for out, rows, x in zip(outputs, held, hidden, strict=True):
        exact = rows_of(module, x.double(), config)
        # Values are near 1; float32 sums of 160 to 1000 terms.
        torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-5)
        expected = expanded(module, x.double(), exact, config)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=5e-5)


def stored_values(rows: Tensor) -> Tensor:
    """Rows of an fp8 pool in float64."""
    if rows.dtype != torch.uint8:
        return torch.from_numpy(decode(rows))
    latent, scales, rope = rows.split([512, 16, 128], -1)
    tiles = torch.from_numpy(decode(latent.contiguous().view(E4M3))).unflatten(-1, (4, 128))
    scaled = tiles * torch.from_numpy(decode(scales.contiguous().view(torch.float32)))[..., None]
    rope = torch.from_numpy(decode(rope.contiguous().view(torch.bfloat16)))
    return torch.cat([scaled.flatten(-2), rope], -1)


@pytest.mark.parametrize(
    "dtype, scale", [(E4M3, None), (E4M3, 0.03), (E5M2, 0.003), (DS_MLA, None)], ids=str
)
def test_fp8_rows_are_read_back_as_stored(dtype: CacheDtype, scale: float | None) -> None:
    module = module_of()
    config = RotaryConfig.from_hf(module.config)
    hidden = inputs()
    outputs, held = run(module, hidden, dtype, scale)
    for out, rows, x in zip(outputs, held, hidden, strict=True):
        stored, exact = stored_values(rows) * (scale or 1.0), rows_of(module, x.double(), config)
        # Half a unit in the last place, and the smallest subnormal (of a tile, whose largest value
        # is below 8, that is 8 / 448 of it).
        rtol = 2**-3 if dtype == E5M2 else 2**-4
        torch.testing.assert_close(stored, exact, rtol=rtol, atol=2**-9)
        expected = expanded(module, x.double(), stored, config)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=5e-5)


def test_what_is_less_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single query is always absorbed; of a prompt, the chunks that are large enough are
    expanded."""
    calls = []
    for name in ("_absorbed", "_expanded"):
        original = getattr(latent, name)

        def spy(q: Tensor, *args: Any, name: str = name, original: Any = original) -> Tensor:
            calls.append((name, len(q), args[1] is None))
            return original(q, *args)

        monkeypatch.setattr(latent, name, spy)
    run(module_of(), inputs(), None)
    absorbed = [(1, False), (17, False), (3, False), (3, False), (1, False)]
    expanded = [(90, True), (33, True), (150, True), (5, True), (140, False)]
    for name, expected in (("_absorbed", absorbed), ("_expanded", expanded)):
        found = [(queries, causal) for call, queries, causal in calls if call == name]
        assert found == expected
