"""`ropool generate`: what it prints, and one line with exit code 2 for what a person can mend."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from engine import tiny_files
from engine.bytes_tokenizer import END_ID
from ropool.cli import generate as command
from ropool.cli.main import main
from ropool.errors import RopoolError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_files.write_directory(tmp_path_factory.mktemp("tiny")))


def generate(*arguments: str) -> int:
    try:
        return main(["generate", *arguments])
    except SystemExit as left:  # argparse leaves by itself
        assert isinstance(left.code, int)
        return left.code


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert generate(*arguments, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(lines[-1])
    return report


def test_json(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(
        capsys, "Hello", "What?", "--model", directory, "--device", "cpu", "--max-new-tokens", "9"
    )
    assert report["model"] == directory and report["device"] == "cpu"
    assert [output["prompt"] for output in report["outputs"]] == ["Hello", "What?"]
    for output in report["outputs"]:
        assert output.keys() == {"prompt", "text", "tokens", "finish_reason"}
        assert output["finish_reason"] in ("stop", "length")
        assert len(output["tokens"]) == 9 or output["tokens"][-1] == END_ID
    assert set(report["kernels"]) >= {"rope_store_kv_"}
    assert "/" in report["kernels"]["rope_store_kv_"]
    assert report["prefill_tokens_per_s"] > 0 and report["decode_tokens_per_s"] > 0
    stated = {"bytes_per_token", "window_bytes_per_token"}
    assert report["pool"].keys() == {"slots", "peak_used", "leaked"} | stated
    # Two layers, K and V of 2 heads, 16 float32 values each.
    assert [report["pool"][key] for key in sorted(stated)] == [2 * 2 * 2 * 16 * 4, 0]
    assert report["pool"]["leaked"] == 0
    assert 0 < report["pool"]["peak_used"] <= report["pool"]["slots"]


def test_prompts_of_a_file_join_the_batch(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts"
    file.write_text("second\n\n third €\n", encoding="utf-8")
    options = ["--model", directory, "--max-new-tokens", "12", "--temperature", "0.8"]
    options += ["--top-p", "0.9", "--seed", "4"]
    report = as_json(capsys, "first", "--prompts-file", str(file), *options)
    assert [output["prompt"] for output in report["outputs"]] == ["first", "second", " third €"]
    for output in report["outputs"]:  # the same seed, so the same text alone
        assert as_json(capsys, output["prompt"], *options)["outputs"] == [output]


def test_one_prompt_streams_and_a_table_follows(
    directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", directory, "--max-new-tokens", "8"]
    text = as_json(capsys, "Hi", *options)["outputs"][0]["text"]
    assert generate("Hi", *options) == 0
    out = capsys.readouterr().out
    assert out.startswith(text + "\n")
    rows = [line.split() for line in out[len(text) :].splitlines() if line]
    labels = [row[0] for row in rows]
    first = ["first"] if sys.platform == "linux" else []
    assert labels == ["device", "kernel", *first, "prefill", "decode", "pool", "pool"]
    assert rows[1][:3] == ["kernel", "of", "rope_store_kv_"]
    assert rows[-1] == ["pool", "bytes", "a", "token", "512"]


def test_several_prompts_are_numbered(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("Hi", "there", "--model", directory, "--max-new-tokens", "3") == 0
    out = capsys.readouterr().out
    assert "[1] Hi\n" in out and "[2] there\n" in out


def test_the_chat_template_can_be_left_out(
    directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", directory, "--max-new-tokens", "6"]
    plain = as_json(capsys, "Q: Hi A:", "--no-chat-template", *options)["outputs"][0]
    chat = as_json(capsys, "Hi", *options)["outputs"][0]
    assert plain["tokens"] == chat["tokens"]


@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_an_fp8_pool(kind: str, directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(capsys, "Hi", "--model", directory, "--kv-cache-dtype", kind)
    assert report["pool"]["leaked"] == 0


def test_scales_of_an_fp8_pool(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", directory, "--kv-cache-dtype", "fp8_e4m3", "--max-new-tokens", "4"]
    path = str(tmp_path / "scales.json")
    calibrated = as_json(capsys, "Hello", *options, "--save-kv-cache-scales", path)
    scales = json.loads(Path(path).read_text())
    assert scales.keys() == {"k_scale", "v_scale"} and scales["k_scale"][0][0] < 1
    given = as_json(capsys, "Hello", *options, "--kv-cache-scales", path)
    assert given["outputs"] == calibrated["outputs"]
    as_json(capsys, "Hi", *options, "--kv-cache-scales", "one", "--save-kv-cache-scales", path)
    assert json.loads(Path(path).read_text())["k_scale"] == [1.0, 1.0]


def test_16_bit_models(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in ("bfloat16", "float16"):
        options = ["--model", directory, "--dtype", dtype, "--max-new-tokens", "4"]
        assert as_json(capsys, "Hi", *options)["outputs"][0]["tokens"]


FP8 = ["--kv-cache-dtype", "fp8_e4m3"]
MISTAKES = {
    "unknown model": (["Hi", "--model", "no-such-model"], "unknown model 'no-such-model'"),
    "prompt too long": (["x" * 300, "--model", "DIR"], "the model's context holds 256"),
    "pool too small": (["Hi", "--model", "DIR", "--pool-tokens", "16"], "the pool has 16 slots"),
    "no pool": (["Hi", "--model", "DIR", "--pool-tokens", "0"], "pool of 0 tokens"),
    "no such pool": (
        ["Hi", "--model", "DIR", "--pool-tokens", "9" * 14],
        "does not fit the memory",
    ),
    **{
        f"a pool of {digits} digits": (
            ["Hi", "--model", "DIR", "--pool-tokens", "9" * digits],
            "does not fit the memory",
        )
        for digits in (10, 11, 23)
    },
    "scales to save without fp8": (
        ["Hi", "--model", "DIR", "--save-kv-cache-scales", "/no/file"],
        "a KV pool of auto has no scales to save",
    ),
    "nowhere to save scales": (
        ["Hi", *FP8, "--model", "DIR", "--save-kv-cache-scales", "/no/file"],
        "/no/file",
    ),
    "scales of a folder": (["Hi", *FP8, "--model", "DIR", "--kv-cache-scales", "/"], "read /: Is"),
    "no prompt": (["--model", "DIR"], "no prompt"),
    "no text": (["caf\udce9", "--model", "DIR"], "is not UTF-8 text"),
    "a file that is no text": (["--prompts-file", sys.executable], "is not UTF-8 text"),
    "no tokens": (["", "--model", "DIR", "--no-chat-template"], "the prompt is empty"),
    "no prompts file": (["--prompts-file", "/no/file"], "/no/file"),
    "temperature": (["Hi", "--temperature", "-1"], "temperature is -1"),
    "top-p": (["Hi", "--top-p", "2"], "top_p is 2"),
    "seed": (["Hi", "--seed", "-1"], "seed is -1, must be at least 0"),
    "new tokens": (["Hi", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "device": (["Hi", "--model", "DIR", "--device", "xpu"], "device xpu is not available"),
    "dtype": (["Hi", "--dtype", "int3"], "int3"),
    "no scales": (
        ["Hi", "--model", "DIR", "--kv-cache-dtype", "fp8_e4m3", "--kv-cache-scales", "/no/file"],
        "/no/file",
    ),
    "scales without fp8": (
        ["Hi", "--model", "DIR", "--kv-cache-scales", "one"],
        "for a pool of cache_dtype fp8 only",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str, directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[name]
    arguments = [directory if argument == "DIR" else argument for argument in arguments]
    assert generate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


def test_scales_that_cannot_be_saved_cost_no_work(
    directory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load", Mock(side_effect=RopoolError("loaded")))
    saved = tmp_path / "scales.json"
    arguments = ["Hi", "--model", directory, "--save-kv-cache-scales"]
    assert generate(*arguments, str(saved)) == 2
    assert "has no scales to save" in capsys.readouterr().err
    assert generate(*arguments, str(tmp_path), *FP8) == 2
    assert "loaded" not in capsys.readouterr().err
    assert generate(*arguments, str(saved), *FP8) == 2
    assert "loaded" in capsys.readouterr().err and not saved.exists()


def test_a_chat_template_that_refuses(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    assert generate("Hi", "--model", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "chat template fails: no users (see --no-chat-templ" in error


def test_what_the_generation_config_asks_for_is_named(
    directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    options = {"repetition_penalty": 1.3, "suppress_tokens": [1, 2], "do_sample": True, "top_k": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(options))
    arguments = ["Hi", "--max-new-tokens", "1", "--model"]
    assert generate(*arguments, str(tmp_path)) == 0
    unread = "repetition_penalty is 1.3, suppress_tokens is [1, 2]"
    line = f"ropool: the model's generation config is not applied: {unread}\n"
    assert capsys.readouterr().err == line
    assert generate(*arguments, directory) == 0
    assert capsys.readouterr().err == ""


def test_the_first_token_is_timed_from_the_start_of_the_process(directory: str) -> None:
    program = "import sys; from ropool.cli.main import main; sys.exit(main())"
    arguments = ["generate", "Hi", "--model", directory, "--max-new-tokens", "2", "--json"]
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    wall = time.perf_counter() - started
    seconds = json.loads(result.stdout)["seconds_to_first_token"]
    if sys.platform != "linux":
        assert seconds is None
        return
    # Nothing of note comes before the start or after the last token, and torch is imported in it.
    assert max(0.3, 0.5 * wall) < seconds <= wall + 0.02


def test_a_broken_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    """No traceback, no warning of a library: the whole of stderr is one line."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    program = "import sys; from ropool.cli.main import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", program, "generate", "Hi", "--model", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**__import__("os").environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert result.returncode == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert "broken.gguf: broken or truncated GGUF" in last
    assert "Traceback" not in result.stderr
