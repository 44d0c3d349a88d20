"""Entry point of the `ropool` command.

Each subcommand is imported only when it is asked for, so that `ropool doctor` works with the base
packages alone, and what a person can mend is told in one line, with exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, NoReturn

import ropool
from ropool import dispatch
from ropool.dispatch import NoKernelError, settings
from ropool.errors import RopoolError

CALLERS_MISTAKE = 2
INTERRUPTED = 130


class Command(NamedTuple):
    """A subcommand: the module has `add_parser(subparsers)` and `run(args) -> int`."""

    module: str
    help: str
    extra: str = ""
    """The extra of the distribution that brings `packages`."""
    packages: tuple[str, ...] = ()


COMMANDS = {
    "generate": Command(
        "ropool.cli.generate",
        "generate text with a model whose KV pool ropool writes",
        "engine",
        ("transformers", "tokenizers", "huggingface_hub", "safetensors", "gguf", "jinja2"),
    ),
    "doctor": Command(
        "ropool.cli.doctor", "report this machine, the backends, and the kernel chosen for each op"
    ),
    "bench": Command(
        "ropool.cli.bench",
        "time the ops on this machine",
        "bench",
        ("transformers", "matplotlib"),
    ),
    "tune": Command("ropool.cli.tune", "find the best layouts of the kernels on this GPU"),
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(CALLERS_MISTAKE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser(command: ModuleType | None, name: str | None) -> argparse.ArgumentParser:
    """The parser with the options of the command that runs, and only the names of the others."""
    parser = OneLineParser(prog="ropool", description=ropool.__doc__)
    parser.add_argument("--version", action="version", version=f"ropool {ropool.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for other, record in COMMANDS.items():
        if other == name and command is not None:
            command.add_parser(subparsers)
        else:
            subparsers.add_parser(other, help=record.help)
    return parser


def run_command(arguments: Sequence[str]) -> int:
    """Parse `arguments`, run the command, and give its exit code."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name not in COMMANDS:
        build_parser(None, None).parse_args(arguments)  # prints help, the version or the mistake
        raise AssertionError("argparse leaves by itself when no command is given")
    record = COMMANDS[name]
    try:
        check_environment()
        command = importlib.import_module(record.module)
        args = build_parser(command, name).parse_args(arguments)
        return int(command.run(args))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in record.packages:
            raise
        raise RopoolError(
            f"{name} needs the package {package}, which is not installed:"
            f" pip install 'ropool[{record.extra}]'"
        ) from error


def check_environment() -> None:
    """Raise `RopoolError` for an environment variable that holds what is not allowed."""
    try:
        settings.current()
        dispatch.unavailable("cpu")  # reads ROPOOL_CPU_ISA
    except ValueError as error:
        raise RopoolError(str(error)) from error


def one_line(error: Exception) -> str:
    """What is printed of an error that the caller can mend."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 2 after one line on stderr for a mistake of the caller's."""
    try:
        code = run_command(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`); what is left in the buffer goes nowhere at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RopoolError, NoKernelError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        message = one_line(error)
        print(message if message.startswith("ropool") else f"ropool: {message}", file=sys.stderr)
        return CALLERS_MISTAKE
