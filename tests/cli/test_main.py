"""The command line as a person meets it: one line and exit code 2 for a mistake, never a
traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ropool import dispatch
from ropool.cli import main as cli
from ropool.dispatch import NoKernelError, settings
from ropool.errors import RopoolError

COMMAND = [sys.executable, "-c", "from ropool.cli.main import main; raise SystemExit(main())"]


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [("ROPOOL_BACKEND", "nope", "reference"), ("ROPOOL_CHECK", "maybe", "0, 1")],
)
def test_bad_environment_variable(
    variable: str,
    value: str,
    allowed: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(settings, "_current", None)
    monkeypatch.setenv(variable, value)
    assert cli.main([command]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ropool: ")
    assert all(word in line for word in (variable, repr(value), allowed))


def test_unusable_instruction_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> str | None:
        raise ValueError("ROPOOL_CPU_ISA=nope cannot be used here; choose one of scalar")

    monkeypatch.setattr(cli.dispatch, "unavailable", refuse)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("ropool: ROPOOL_CPU_ISA=nope ")


def test_exit_code_of_the_process() -> None:
    environment = {**os.environ, "ROPOOL_BACKEND": "nope"}
    done = subprocess.run(
        [*COMMAND, "doctor"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_doctor_as_json_without_the_optional_packages() -> None:
    # As on an installation of torch and numpy alone: every other package fails to import.
    script = (
        "import sys\n"
        "for name in ('transformers', 'gguf', 'safetensors', 'matplotlib', 'mlx', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "from ropool.cli.main import main\n"
        "raise SystemExit(main(['doctor', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {entry["backend"] for entry in found["backends"]} >= {"cpu", "reference"}
    assert found["settings"]["ROPOOL_CHECK"] in (False, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["bogus"], "'bogus'"),
        (["doctor", "--bogus"], "--bogus"),
        (["--bogus"], "COMMAND"),
        (["--", "doctor", "more"], ""),
    ],
)
def test_misuse_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ropool")
    assert words in line


def fake_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `ropool generate` a command that raises `error`."""

    def raise_it(args: object) -> int:
        raise error

    dispatch.unavailable("cpu")  # asked once a process, and not of the fake module
    module = types.ModuleType("fake")
    module.add_parser = lambda subparsers: subparsers.add_parser("generate")  # type: ignore[attr-defined]
    module.run = raise_it  # type: ignore[attr-defined]
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RopoolError("model 'x' is unknown"), "ropool: model 'x' is unknown\n"),
        (RopoolError("ropool: two\nlines"), "ropool: two lines\n"),
        (
            NoKernelError("ropool.rope_: no kernel can serve it"),
            "ropool.rope_: no kernel can serve it\n",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "prompts.txt"),
            "ropool: prompts.txt: No such file or directory\n",
        ),
        (
            ModuleNotFoundError("No module named 'gguf'", name="gguf"),
            "ropool: generate needs the package gguf, which is not installed:"
            " pip install 'ropool[engine]'\n",
        ),
        (
            ModuleNotFoundError("No module named 'transformers.x'", name="transformers.x"),
            "ropool: generate needs the package transformers, which is not installed:"
            " pip install 'ropool[engine]'\n",
        ),
    ],
)
def test_what_the_caller_can_mend_is_one_line(
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_command(monkeypatch, error)
    assert cli.main(["generate"]) == 2
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [ValueError("a bug"), ModuleNotFoundError("x", name="ropool.x")])
def test_a_defect_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["generate"])


def test_interrupt_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["generate"]) == 130
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [*COMMAND, "doctor"], stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 0
    assert done.stderr == ""


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    source = Path(cli.ropool.__file__).read_text()
    version = capsys.readouterr().out.split()[-1]
    assert f'__version__ = "{version}"' in source
