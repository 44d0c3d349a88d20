"""`ropool generate --engine mlx`: the same text and the same JSON as the PyTorch engine's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from engine import tiny_files
from ropool import dispatch
from ropool.cli.main import main

OPTIONS = ("--device", "cpu", "--max-new-tokens", "16")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_files.write_directory(tmp_path_factory.mktemp("tiny")))


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["generate", *arguments, *OPTIONS, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_both_engines_answer_alike(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("Hello", "What is this?", "A much longer prompt, which takes a few pages of it.")
    ours = report(capsys, *prompts, "--model", directory, "--engine", "mlx")
    theirs = report(capsys, *prompts, "--model", directory, "--engine", "torch")
    assert ours.keys() == theirs.keys() and ours["pool"].keys() == theirs["pool"].keys()
    assert ours["outputs"] == theirs["outputs"]
    assert ours["device"] == "cpu" and ours["pool"]["leaked"] == 0
    if dispatch.unavailable("metal") is None:
        assert ours["kernels"] == {"rope_store_kv_": "metal/rope_store_kv"}
    assert ours["decode_tokens_per_s"] > 0 and ours["pool"]["bytes_per_token"] > 0


@pytest.mark.parametrize(
    "system, packages, engine",
    [("darwin", True, "mlx"), ("darwin", False, "torch"), ("linux", True, "torch")],
)
def test_the_default_engine(
    system: str, packages: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ropool.cli import generate

    monkeypatch.setattr("sys.platform", system)
    found = object() if packages else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert generate._engine_kind("auto") == engine
    assert generate._engine_kind("torch") == "torch" and generate._engine_kind("mlx") == "mlx"


def test_without_the_kernel(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("Hello", "--model", directory, "--engine", "mlx")
    with_kernel = report(capsys, *arguments)
    monkeypatch.setenv("ROPOOL_MLX_CUSTOM_ROPE", "0")
    without = report(capsys, *arguments)
    assert without["outputs"] == with_kernel["outputs"]
    assert without["kernels"] == {"store_kv_": "mlx/store_kv"}


def test_sampling_is_the_requests_own(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", directory, "--engine", "mlx", "--temperature", "0.9", "--seed", "3")
    both = report(capsys, "Hello", "What?", *options)["outputs"]
    assert report(capsys, "What?", *options)["outputs"] == both[1:]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kv-cache-dtype", "fp8_e4m3"], "--kv-cache-dtype is fp8_e4m3; allowed with engine mlx"),
        (["--kv-cache-scales", "one"], "--kv-cache-scales is one; allowed with engine mlx: auto"),
        (["--save-kv-cache-scales", "x"], "--save-kv-cache-scales: "),
        (
            ["--kv-cache-dtype", "fp8_e4m3", "--save-kv-cache-scales", "/dev/null"],
            "--save-kv-cache-scales: the KV pool of engine mlx has no scales",
        ),
        (["--device", "cuda"], "--device is cuda; allowed with engine mlx: auto, cpu"),
        (["--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["--model", str(Path(__file__).parent)], "has no config.json"),
        (["--pool-tokens", "16"], "the pool has 16 slots"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "Hi", "--engine", "mlx", "--model", directory, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_a_bad_setting(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROPOOL_MLX_CUSTOM_ROPE", "on")
    assert main(["generate", "Hi", "--engine", "mlx", "--model", directory]) == 2
    assert "ROPOOL_MLX_CUSTOM_ROPE is 'on'; allowed: auto, 1, 0" in capsys.readouterr().err
