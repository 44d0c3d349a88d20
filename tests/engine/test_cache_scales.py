"""fp8 pools: what is stored with which scale, where scales come from, and that they never change
under rows that are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import tiny, tiny_files
from ropool.engine import CacheScales, Engine, SamplingParams
from ropool.engine.inputs import PromptInputs
from ropool.errors import RopoolError
from ropool.integrations.transformers import PooledModel, load
from ropool.integrations.transformers import attention as attention_module

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PARAMS = SamplingParams(max_new_tokens=16)
LAYERS, HEADS = 3, 2
"""Of the tiny llama."""


@pytest.fixture
def model() -> PooledModel:
    return PooledModel(tiny.build("llama"))


def logits_and_tokens(
    engine: Engine, prompts: Sequence[Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[list[int]]]:
    """The logits of every step, in order, and the answers."""
    logits = []
    forward = engine.model.forward

    def spy(step: Any) -> Tensor:
        logits.append(forward(step).clone())
        return logits[-1]

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", spy)
        answers = [request.output for request in engine.generate(prompts, PARAMS)]
    return torch.cat(logits), answers


def random_scales(shape: tuple[int, ...]) -> CacheScales:
    generator = torch.Generator().manual_seed(1)
    return CacheScales(tuple(0.02 + torch.rand(2, *shape, generator=generator)))


@pytest.mark.parametrize("scales", ["one", "layer", "head"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_an_fp8_pool_is_the_exact_one_rounded(
    dtype: torch.dtype, scales: str, model: PooledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "one": CacheScales.one(model.spec),
        "layer": random_scales((LAYERS,)),
        "head": random_scales((LAYERS, HEADS)),
    }[scales]
    options = {"pool_tokens": 256, "max_batch_tokens": 64}
    prompts = tiny.prompts(2, longest=60, seed=2)
    stored = Engine(model, cache_dtype=dtype, cache_scales=given, **options)
    assert stored.cache.layers[0].k.dtype == dtype
    logits, answers = logits_and_tokens(stored, prompts, monkeypatch)

    op = attention_module.rope_store_kv_
    calls = 0

    def store_and_round(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        op(*args, **kwargs)
        for pool, values in zip(args[3:5], given.values, strict=True):
            scale = values[calls % LAYERS].expand(HEADS)[:, None]
            # A second rounding changes nothing: rows of earlier steps stay as they are.
            pool.copy_((pool / scale).to(dtype).float() * scale)
        calls += 1

    monkeypatch.setattr(attention_module, "rope_store_kv_", store_and_round)
    rounded = Engine(model, **options)
    expected, expected_answers = logits_and_tokens(rounded, prompts, monkeypatch)
    assert answers == expected_answers
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if not name.startswith("deepseek")])
def test_fp8_pools_of_every_family(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, in a pool that is too small for all, with windows, and with powers of two, by which
    a kernel may multiply or divide."""
    model = PooledModel(tiny.build(name).to(device))
    layers = len(model.spec.windows)
    scales = CacheScales(tuple(2.0 ** -torch.arange(2.0, 2.0 + 2 * layers).view(2, -1)))
    prompts = tiny.prompts(4, longest=60, seed=2)
    options = {"pool_tokens": 160, "max_batch_tokens": 32, "max_requests": 4}
    stored = Engine(model, cache_dtype=E4M3, cache_scales=scales, **options)
    logits, answers = logits_and_tokens(stored, prompts, monkeypatch)
    assert stored.scheduler.preemptions > 0

    op = attention_module.rope_store_kv_
    calls = 0

    def store_and_round(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        op(*args, **kwargs)
        for pool, values in zip(args[3:5], scales.values, strict=True):
            scale = float(values[calls % layers])
            pool.copy_((pool / scale).clamp(-448.0, 448.0).to(E4M3).float() * scale)
        calls += 1

    monkeypatch.setattr(attention_module, "rope_store_kv_", store_and_round)
    expected, expected_answers = logits_and_tokens(Engine(model, **options), prompts, monkeypatch)
    assert answers == expected_answers
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


def scale_of(largest: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """The smallest power of two that leaves room for twice the largest value."""
    most = {E4M3: 448.0, E5M2: 57344.0}[dtype]
    powers = 2.0 ** torch.arange(-40.0, 40.0)
    fits = powers * most >= 2 * largest.unsqueeze(-1)
    return powers[fits.int().argmax(-1)]


def largest_in_cache(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The largest rotated K and the largest V of each layer and head, `[layers, Hk]`, that the
    cache of `transformers` holds after the prompts."""
    found = torch.zeros(2, model.config.num_hidden_layers, model.config.num_key_value_heads)
    for prompt in prompts:
        with torch.no_grad():
            cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
        for layer, kept in enumerate(cache.layers):
            for kind, tensor in enumerate((kept.keys, kept.values)):
                largest = tensor[0].abs().amax((1, 2))
                found[kind, layer] = torch.maximum(found[kind, layer], largest)
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_calibrated_scales_follow_the_cache_of_transformers(name: str, dtype: torch.dtype) -> None:
    model = tiny.build(name)
    # So short that the window drops nothing.
    prompts = tiny.prompts(3, longest=20, seed=4)
    expected = largest_in_cache(model, prompts)
    engine = Engine(PooledModel(model), pool_tokens=256, cache_dtype=dtype)
    engine.generate(prompts, PARAMS)
    assert engine.cache.scales is not None
    for scale, largest in zip(engine.cache.scales.values, expected, strict=True):
        assert torch.equal(scale, scale_of(largest, dtype))
    for number, layer in enumerate(engine.cache.layers):  # and the op is given the same
        for used, scale in zip(layer[2:4], engine.cache.scales.values, strict=True):
            assert used is not None and torch.equal(used, scale[number])


def test_latent_rows_have_one_scale_a_layer() -> None:
    pooled = PooledModel(tiny.build("deepseek_v3"))
    prompt = tiny.prompts(1, longest=40, seed=3)
    exact = Engine(pooled, pool_tokens=64)
    exact.generate(prompt, SamplingParams(max_new_tokens=1))
    engine = Engine(pooled, pool_tokens=64, cache_dtype=E4M3)
    engine.generate(prompt, PARAMS)
    for ours, theirs in zip(engine.cache.latent_layers, exact.cache.latent_layers, strict=True):
        assert ours.scale is not None
        assert torch.equal(ours.scale, scale_of(theirs.rows.abs().max()))


def test_images_are_calibrated_on_too() -> None:
    pooled = PooledModel(tiny.build("qwen2_vl"))
    prompt = [5] * 12
    rows = 3.0 * torch.randn(8, pooled.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    found = []
    for inputs in (None, PromptInputs(embeddings={2: rows})):
        exact = Engine(pooled, pool_tokens=64)
        exact.add(prompt, SamplingParams(max_new_tokens=1), inputs)
        exact.step()
        engine = Engine(pooled, pool_tokens=64, cache_dtype=E4M3)
        engine.add(prompt, PARAMS, inputs)
        engine.step()
        for ours, theirs in zip(engine.cache.layers, exact.cache.layers, strict=True):
            assert ours.v_scale is not None
            assert torch.equal(ours.v_scale, scale_of(theirs.v.abs().amax((0, 1, 3))))
        found.append(engine.cache.scales.values[1])
    assert not torch.equal(*found)


def test_rows_that_left_the_window_count_too() -> None:
    """The largest V stands at the front of a prompt that is longer than the window's pool."""
    model = tiny.build("mistral-window")
    first = model.model.layers[0]
    with torch.no_grad():
        values = first.self_attn.v_proj(first.input_layernorm(model.model.embed_tokens.weight))
    largest = values.unflatten(-1, (2, -1)).abs().amax(-1)
    front, filler = int(largest[:, 0].argmax()), int(largest[:, 0].argmin())
    assert scale_of(largest[front, 0]) > scale_of(largest[filler, 0])
    engine = Engine(PooledModel(model), pool_tokens=256, cache_dtype=E4M3)
    scale = engine.calibrate([[front] + [filler] * 200]).values[1][0, 0]
    assert scale == scale_of(largest[front, 0])


def test_scales_hold_from_the_first_step_on(model: PooledModel) -> None:
    engine = Engine(model, pool_tokens=512, cache_dtype=E4M3)
    engine.generate([[1, 2, 3]], PARAMS)
    assert engine.cache.scales is not None
    before = [value.clone() for value in engine.cache.scales.values]
    used = [tensor.clone() for layer in engine.cache.layers for tensor in layer[2:4]]
    for attempt in (
        lambda: engine.calibrate([[9, 8]]),
        lambda: engine.cache.set_scales(CacheScales.one(model.spec)),
    ):
        with pytest.raises(RopoolError, match="cannot change: rows are stored"):
            attempt()
    engine.add(list(range(100)), PARAMS)
    engine.step()
    assert all(map(torch.equal, before, engine.cache.scales.values))
    assert all(map(torch.equal, used, [t for layer in engine.cache.layers for t in layer[2:4]]))


def test_calibration_takes_whole_prompts_up_to_its_limit() -> None:
    model = tiny.build("llama", max_position_embeddings=2048)
    pooled = PooledModel(tiny.copy_of(model))
    prompts = [[3] * 600, [4] * 424, [5]]
    expected = largest_in_cache(model, prompts[:2])
    scales = Engine(pooled, pool_tokens=2048, cache_dtype=E4M3).calibrate(prompts)
    assert torch.equal(scales.values[0], scale_of(expected[0]))
    alone = Engine(pooled, pool_tokens=2048, cache_dtype=E4M3).calibrate([[6] * 1500, [7]])
    expected = largest_in_cache(model, [[6] * 1500])
    assert torch.equal(alone.values[1], scale_of(expected[1]))


def test_a_request_is_the_same_whatever_follows_it(model: PooledModel) -> None:
    scales = Engine(model, pool_tokens=64, cache_dtype=E4M3).calibrate([[1, 2, 3]])
    prompts = tiny.prompts(5, longest=40, seed=6)
    options = {"cache_dtype": E4M3, "cache_scales": scales}
    together = Engine(model, pool_tokens=160, max_batch_tokens=17, max_requests=5, **options)
    answers = [request.output for request in together.generate(prompts, PARAMS)]
    assert together.scheduler.preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (
            Engine(model, pool_tokens=64, **options).generate([prompt], PARAMS)[0].output == answer
        )


def test_small_values_need_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """V below the smallest e4m3 number is lost at scale 1 and kept by a calibrated one."""
    model = tiny.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 1e-4
            layer.self_attn.o_proj.weight *= 1e4
    pooled = PooledModel(model)
    prompt = tiny.prompts(1, longest=40, seed=8)
    errors = []
    exact = logits_and_tokens(Engine(pooled, pool_tokens=64), prompt, monkeypatch)[0][0]
    for scales in (CacheScales.one(pooled.spec), None):
        engine = Engine(pooled, pool_tokens=64, cache_dtype=E4M3, cache_scales=scales)
        logits = logits_and_tokens(engine, prompt, monkeypatch)[0]
        # The first logits of a calibrated run are those of the calibration.
        errors.append(float((logits[0 if scales else 1] - exact).norm() / exact.norm()))
    assert errors[1] < 0.1 < 0.5 < errors[0]


def test_a_layer_of_zeros_has_scale_1() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:16] = 0  # the first of two heads
    engine = Engine(PooledModel(model), pool_tokens=64, cache_dtype=E4M3)
    engine.generate([[1, 2, 3]], PARAMS)
    assert engine.cache.scales is not None
    values = engine.cache.scales.values[1]
    assert values[1, 0] == 1.0 and 0 < values[1, 1] < 0.1


def test_values_that_are_not_finite_have_no_scale() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = torch.nan
    engine = Engine(PooledModel(model), pool_tokens=64, cache_dtype=E4M3)
    engine.add([1, 2, 3], PARAMS)
    with pytest.raises(RopoolError, match="k_scale of layer 0 cannot be calibrated"):
        engine.step()


def test_only_an_fp8_pool_has_scales(model: PooledModel) -> None:
    with pytest.raises(RopoolError, match="for a pool of cache_dtype fp8 only"):
        Engine(model, pool_tokens=64, cache_scales=CacheScales.one(model.spec))
    with pytest.raises(RopoolError, match=r"torch\.float32 has no scales to calibrate"):
        Engine(model, pool_tokens=64).calibrate([[1]])
    with pytest.raises(RopoolError, match="no prompt to calibrate on"):
        Engine(model, pool_tokens=64, cache_dtype=E4M3).calibrate([])


def test_a_file_gives_back_what_was_written(model: PooledModel, tmp_path: Path) -> None:
    for shape in ((LAYERS,), (LAYERS, HEADS)):
        scales = random_scales(shape)
        scales.write(tmp_path / "scales.json", model.spec)
        read = CacheScales.read(tmp_path / "scales.json", model.spec)
        assert all(map(torch.equal, scales.values, read.values))


BAD_FILES = {
    "no JSON": ("{", "has no cache scales"),
    "a list": ("[1, 2]", "has no cache scales"),
    "one missing": ('{"k_scale": [1, 1, 1]}', "has no cache scales 'v_scale'"),
    "ragged": ('{"k_scale": [1, [1, 2], 1], "v_scale": [1, 1, 1]}', "has no cache scales"),
    "other layers": (
        '{"k_scale": [1, 1], "v_scale": [1, 1, 1]}',
        r"k_scale is \[2\]; allowed: \[3\] or \[3, 2\]",
    ),
    "a large number": (f'{{"k_scale": [1{"0" * 400}, 1, 1]}}', "has no cache scales"),
    "deep": ("[" * 100000, "has no cache scales"),
    "zero": ('{"k_scale": [1, 1, 1], "v_scale": [1, 0, 1]}', "v_scale of layer 1 is 0.0"),
    "NaN": ('{"k_scale": [NaN, 1, 1], "v_scale": [1, 1, 1]}', "k_scale of layer 0 is nan"),
}


def test_a_file_that_is_not_there(model: PooledModel, tmp_path: Path) -> None:
    with pytest.raises(RopoolError, match=r"cannot read .*none\.json: No such file"):
        CacheScales.read(tmp_path / "none.json", model.spec)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name: str, model: PooledModel, tmp_path: Path) -> None:
    text, message = BAD_FILES[name]
    path = tmp_path / "scales.json"
    path.write_text(text)
    with pytest.raises(RopoolError, match=message):
        CacheScales.read(path, model.spec)


def directory_with_scales(path: Path, change: dict[str, Tensor | None]) -> Path:
    """The tiny model on disk with a scale of 0.5 for K and 0.25 for V, as quantisation tools leave
    them, and `change`."""
    tiny_files.write_directory(path)
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        tensors |= {prefix + "k_scale": torch.tensor(0.5), prefix + "v_scale": torch.tensor([0.25])}
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_scales_in_the_files_of_a_model_are_used(tmp_path: Path) -> None:
    model, _ = load(str(directory_with_scales(tmp_path, {})))
    engine = Engine(model, pool_tokens=64, cache_dtype=E4M3)
    assert [layer.k_scale.tolist() for layer in engine.cache.layers] == [[0.5, 0.5]] * 2
    assert [layer.v_scale.tolist() for layer in engine.cache.layers] == [[0.25, 0.25]] * 2
    engine.generate([[1, 2, 3]], PARAMS)
    assert engine.cache.scales is model.cache_scales
    one = CacheScales.one(model.spec)
    assert Engine(model, pool_tokens=64, cache_dtype=E4M3, cache_scales=one).cache.scales is one
    assert Engine(model, pool_tokens=64).cache.scales is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.layers.1.self_attn.k_scale": None}, "k_scale of some layers, none of layer 1"),
        ({"model.layers.1.self_attn.v_scale": torch.tensor(-1.0)}, "v_scale of layer 1 is -1.0"),
        ({"model.layers.0.self_attn.k_scale": torch.ones(2)}, "k_scale of different sizes"),
    ],
)
def test_bad_scales_in_the_files_of_a_model_are_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    model, _ = load(str(directory_with_scales(tmp_path, change)))
    Engine(model, pool_tokens=64).generate([[1, 2, 3]], PARAMS)
    with pytest.raises(RopoolError, match=message):
        Engine(model, pool_tokens=64, cache_dtype=E4M3)
    one = CacheScales.one(model.spec)
    assert Engine(model, pool_tokens=64, cache_dtype=E4M3, cache_scales=one).cache.scales is one


def test_scales_of_heads_in_the_files_of_a_model(tmp_path: Path) -> None:
    scales = {
        f"model.layers.{layer}.self_attn.k_scale": torch.tensor([0.5, 2.0]) for layer in (0, 1)
    }
    model, _ = load(str(directory_with_scales(tmp_path, scales)))
    assert model.cache_scales is not None
    assert model.cache_scales.values[0].tolist() == [[0.5, 2.0]] * 2
    assert model.cache_scales.values[1].tolist() == [0.25] * 2
