"""The kernel registry: what is built, what is not, and why."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
nn = pytest.importorskip("mlx.nn")
from mlx_extension.device import use_device  # noqa: E402

use_device()

from mlx_engine import tiny  # noqa: E402
from ropool import dispatch  # noqa: E402
from ropool.dispatch import Device, NoKernelError, registry, tuning  # noqa: E402
from ropool.engine import SamplingParams  # noqa: E402
from ropool.errors import RopoolError  # noqa: E402
from ropool.mlx import aot, policy  # noqa: E402
from ropool.mlx.aot import (  # noqa: E402
    MlxAOTKernelBuildInputs,
    MlxAOTKernelContext,
    MlxAOTKernelRegistry,
    MlxAOTKernelSet,
    MlxAOTKernelSpec,
)
from ropool.mlx.engine import MlxEngine  # noqa: E402
from ropool.mlx.model import MlxModel  # noqa: E402
from ropool.mlx.rotation import read_rotation  # noqa: E402

pytestmark = pytest.mark.skipif(
    dispatch.unavailable("metal") is not None, reason="ropool-metal is not installed"
)


@pytest.fixture
def inputs() -> MlxAOTKernelBuildInputs:
    return MlxModel(tiny.build("llama"), frozenset()).inputs


def test_both_kernels_are_built_and_logged(
    inputs: MlxAOTKernelBuildInputs, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ropool.mlx"):
        built = aot.registry.build_kernel_set(inputs)
    assert callable(built.rope) and callable(built.kv_store)
    assert built.labels == {
        "rope_store_kv_": "metal/rope_store_kv",
        "store_kv_": "metal/store_kv",
    }
    assert "rope: metal/rope_store_kv for rope_store_kv_(" in caplog.text
    assert "kv_store: metal/store_kv for store_kv_(" in caplog.text


@pytest.mark.parametrize("setting", ["0", "1", "auto", ""])
def test_the_setting(
    setting: str, inputs: MlxAOTKernelBuildInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(policy.VARIABLE, setting)
    built = aot.registry.build_kernel_set(inputs)
    assert (built.rope is None) == (setting == "0")
    assert built.labels["store_kv_"] == ("mlx" if setting == "0" else "metal") + "/store_kv"


def test_a_setting_that_is_not_allowed(
    inputs: MlxAOTKernelBuildInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(policy.VARIABLE, "yes")
    with pytest.raises(RopoolError, match="CUSTOM_ROPE is 'yes'; allowed: auto, 1, 0"):
        aot.registry.build_kernel_set(inputs)


def without_extension(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setitem(registry._unavailable, "metal", reason)
    dispatch.cache.clear()


def test_a_missing_extension(
    inputs: MlxAOTKernelBuildInputs,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    without_extension(monkeypatch, "no module named ropool_metal")
    with caplog.at_level(logging.INFO, "ropool.mlx"):
        built = aot.registry.build_kernel_set(inputs)
    assert built.rope is None and built.labels == {"store_kv_": "mlx/store_kv"}
    assert "rope: disabled, no module named ropool_metal" in caplog.text
    monkeypatch.setenv(policy.VARIABLE, "1")
    with pytest.raises(NoKernelError, match="no module named ropool_metal"):
        aot.registry.build_kernel_set(inputs)
    dispatch.cache.clear()


def test_another_mlx_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from ropool.backends import metal

    for name in [name for name in sys.modules if name.startswith("ropool_metal")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(mx, "__version__", "0.99.0")
    reason = metal.available()
    assert reason is not None and "is built for mlx" in reason and "0.99.0" in reason


class Shifted(nn.Module):
    """A rotation of a kind that ropool does not know."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: Any, offset: Any = 0) -> Any:
        return self.inner(x, offset=offset + 3)


@pytest.mark.parametrize("first", [0, 1])
def test_a_rotation_that_cannot_be_expressed(
    first: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model rotates by itself, and a kernel writes K and V; in whichever layer it stands."""
    model = tiny.build("llama")
    for layer in model.layers[first:]:
        layer.self_attn.rope = Shifted(layer.self_attn.rope)
    with caplog.at_level(logging.INFO, "ropool.mlx"):
        ours = MlxModel(tiny.copy_of(model), frozenset())
    assert ours.kernels.rope is None and callable(ours.kernels.kv_store)
    assert "rope: disabled, Shifted has no fixed frequencies" in caplog.text
    ragged = tiny.prompts(3, longest=40)
    requests = MlxEngine(ours, pool_tokens=256).generate(ragged, SamplingParams(max_new_tokens=8))
    for prompt, request in zip(ragged, requests, strict=True):
        assert request.output == tiny.greedy(model, prompt, 8)[0]
    assert dispatch.chosen["store_kv_"] == "metal/store_kv"
    monkeypatch.setenv(policy.VARIABLE, "1")
    with pytest.raises(RopoolError, match="CUSTOM_ROPE is 1, but no kernel can rotate here: Shif"):
        MlxModel(tiny.copy_of(model), frozenset())


@pytest.mark.parametrize("context, table", [(2**24, False), (2**24 + 1, False), (2**24 + 1, True)])
def test_positions_that_a_gpu_has_no_exact_angles_of(context: int, table: bool) -> None:
    """On a CPU, where the frequencies of such a context are read in float64, there are none."""
    rotation = read_rotation(nn.RoPE(16, base=1e4), context, table=table)
    if context > 2**24 and not table:
        assert rotation.arguments is None and f"context is {context}, of which" in rotation.reason
    else:
        assert rotation.arguments is not None and "inv_freq" in rotation.arguments


def test_unknown_attributes_raise() -> None:
    with pytest.raises(AttributeError, match="no kernel 'ropes'; registered: rope"):
        _ = MlxAOTKernelSet({"rope": None}).ropes


def test_a_kernel_of_ones_own(inputs: MlxAOTKernelBuildInputs) -> None:
    own = MlxAOTKernelRegistry()
    spec = MlxAOTKernelSpec(
        "twice", "store_kv_", lambda inputs: None, lambda inputs: ("my/twice", lambda x: (2 * x,))
    )
    own.register(spec)
    own.register(spec)
    assert own.build_kernel_set(inputs).twice(3) == (6,)  # type: ignore[misc]
    with pytest.raises(ValueError, match="kernel 'twice' is registered already"):
        own.register(replace(spec, op="rope_store_kv_"))


def on(name: str, inputs: MlxAOTKernelBuildInputs, heads_kv: int) -> Any:
    elsewhere = replace(inputs, device=Device("mlx", name), heads_kv=heads_kv)
    return aot.registry.build_kernel_set(elsewhere)


@pytest.mark.parametrize(
    "device, heads_kv, tokens, rotates",
    [
        ("cpu", 2, 512, True),
        ("Apple M4 Max", 2, 512, False),
        ("Apple M4 Max", 2, 255, True),
        ("Apple M4 Max", 8, 512, True),
    ],
)
def test_shapes_that_lose_keep_the_built_in_path(
    device: str, heads_kv: int, tokens: int, rotates: bool, inputs: MlxAOTKernelBuildInputs
) -> None:
    built = on(device, inputs, heads_kv)
    assert MlxAOTKernelContext.for_step(built, tokens).rotates == rotates


def test_a_users_table_goes_first(
    inputs: MlxAOTKernelBuildInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROPOOL_TUNING", str(tmp_path))
    built = on("Apple M4 Max", inputs, 2)
    assert built.inputs is not None
    subject = tuning.subject(built.inputs.key("rope_store_kv_"))
    table = tuning.Table("metal", "Apple M4 Max")
    table.entries[subject] = {1: {"fused": False}, 512: {"fused": True}}
    tuning.write(table, tmp_path)
    assert not MlxAOTKernelContext.for_step(built, 2).rotates
    assert MlxAOTKernelContext.for_step(built, 400).rotates
    monkeypatch.setenv(policy.VARIABLE, "1")
    assert MlxAOTKernelContext.for_step(built, 2).rotates
    monkeypatch.undo()
    tuning.forget()


def test_tune_writes_what_the_registry_reads(
    tmp_path: Path,
    inputs: MlxAOTKernelBuildInputs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ropool.cli import probes
    from ropool.cli.main import main
    from ropool.mlx import tune

    monkeypatch.setattr(tune, "SECONDS", 0.001)
    monkeypatch.setenv("ROPOOL_TUNING", str(tmp_path))
    options = ["--heads", "4x2x16", "--dtype", "float32", "--tokens", "1,64"]
    assert main(["tune", "--mlx", *options, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("4x2x16 float32 T=1: MLX ")
    table = tuning.parse((tmp_path / "metal-cpu.json").read_text(), "the table")
    [choices] = table.entries.values()
    assert sorted(choices) == [1, 64]
    assert table.measured_with == {"mlx": mx.__version__, "processor": probes.cpu_model()}
    tuning.forget()
    built = aot.registry.build_kernel_set(inputs)  # the tiny llama has these very heads
    for tokens, choice in choices.items():
        assert MlxAOTKernelContext.for_step(built, tokens).rotates == choice["fused"]
    monkeypatch.undo()
    tuning.forget()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--heads", "4x2"], "heads are '4x2'; allowed with --mlx: HqxHkxD"),
        (["--heads", "3x2x16"], "heads are '3x2x16'; allowed with --mlx: Hq a multiple of Hk"),
        (["--heads", "4x2x15"], "heads are '4x2x15'; allowed with --mlx: Hq a multiple of Hk, and"),
        (["--tokens", "8,0"], "tokens is '0'; allowed: whole numbers from 1"),
    ],
)
def test_tune_names_a_mistake(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ropool.cli.main import main

    assert main(["tune", "--mlx", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
