"""What the engine says a token costs in its pool, against the formula and against the tensors."""

from __future__ import annotations

import pytest
import torch

from engine import tiny
from ropool.engine import Engine, ModelSpec
from ropool.engine.cache import KVCache
from ropool.engine.pools import CacheDtype, pool_dtype, row_bytes
from ropool.engine.spec import KVRow, LatentRow
from ropool.errors import RopoolError
from ropool.integrations.transformers import PooledModel
from ropool.kvcache import MHAPool, MLAFormat

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DS_MLA = MLAFormat.FP8_DS_MLA


def spec_of(
    row: KVRow | LatentRow, windows: tuple[int | None, ...], dtype: torch.dtype = torch.bfloat16
) -> ModelSpec:
    return ModelSpec(
        row=row,
        windows=windows,
        max_position=4096,
        rotary_switch=None,
        position_streams=1,
        hidden_size=64,
        eos_ids=frozenset(),
        vocabulary=10,
        dtype=dtype,
        device=torch.device("cpu"),
    )


# (row, windows of the layers, what the pool stores) -> bytes a token: kept, and inside the window.
HEADS, LATENT = KVRow(8, 128), LatentRow(512, 64)
STATEMENTS: dict[str, tuple[KVRow | LatentRow, tuple[int | None, ...], CacheDtype | None, int, int]]
STATEMENTS = {
    "heads": (HEADS, (None,) * 3, None, 3 * 2 * 8 * 128 * 2, 0),
    "heads fp8": (HEADS, (None,) * 3, E4M3, 3 * 2 * 8 * 128, 0),
    "windows": (HEADS, (64, 64, None), None, 2 * 8 * 128 * 2, 2 * 2 * 8 * 128 * 2),
    "windows only": (HEADS, (64, 64), None, 0, 2 * 2 * 8 * 128 * 2),
    "windows fp8": (HEADS, (64, None, 64), E5M2, 2 * 8 * 128, 2 * 2 * 8 * 128),
    "latent": (LATENT, (None,) * 3, None, 3 * (512 + 64) * 2, 0),
    "latent fp8": (LATENT, (None,) * 3, E4M3, 3 * (512 + 64), 0),
    "latent 656": (LATENT, (None,) * 3, DS_MLA, 3 * (512 + 4 * 4 + 64 * 2), 0),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_bytes_per_token_are_those_of_the_tensors(name: str) -> None:
    row, windows, dtype, kept, inside = STATEMENTS[name]
    spec = spec_of(row, windows)
    cache = KVCache(spec, pool_tokens=64, max_requests=1, max_batch_tokens=64, dtype=dtype)
    assert (cache.bytes_per_token, cache.window_bytes_per_token) == (kept, inside)
    assert row_bytes(row, pool_dtype(spec, dtype)) * len(windows) == kept + inside
    held = 0
    for layer in cache.layers:
        slots = layer.k.shape[0] * layer.k.shape[1]
        held += (layer.k.nbytes + layer.v.nbytes) // slots
    for latent in cache.latent_layers:
        held += latent.rows.nbytes // (latent.rows.shape[0] * latent.rows.shape[1])
    assert held == kept + inside


def test_a_latent_pool_is_one_row_a_token() -> None:
    """No K and no V of any head: `L + R` values, whatever the number of heads."""
    spec = spec_of(LATENT, (None, None))
    cache = KVCache(spec, pool_tokens=64, max_requests=1, max_batch_tokens=64)
    assert not cache.layers and not any(isinstance(p, MHAPool) for p in cache.pools.values())
    assert [tuple(layer.rows.shape) for layer in cache.latent_layers] == [(4, 16, 512 + 64)] * 2


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-some-windows"])
def test_a_model_states_its_bytes(name: str) -> None:
    model = tiny.build(name)
    engine = Engine(PooledModel(model), pool_tokens=256)
    layer = 2 * model.config.num_key_value_heads * (model.config.hidden_size // 4) * 4
    windowed = {"llama": 0, "mistral-window": 3, "qwen2-some-windows": 2}[name]
    stated = engine.cache.bytes_per_token, engine.cache.window_bytes_per_token
    assert stated == ((3 - windowed) * layer, windowed * layer)


def test_what_no_op_writes_is_refused() -> None:
    for row in (HEADS, LatentRow(256, 64)):
        with pytest.raises(RopoolError, match=r"is fp8_ds_mla; allowed: torch.bfloat16"):
            pool_dtype(spec_of(row, (None,)), DS_MLA)
    with pytest.raises(RopoolError, match=r"cache_dtype is torch.float32; .*, fp8_ds_mla$"):
        pool_dtype(spec_of(LATENT, (None,)), torch.float32)
