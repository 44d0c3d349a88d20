"""`ropool tune`: measure how the kernels are best laid out on this GPU, and remember it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ropool.bench.scratch import VARIANTS, Subject, subject
from ropool.bench.tune import tune
from ropool.bench.workload import DTYPES
from ropool.cli.bench import listed, numbers
from ropool.dispatch import OPS, tuning
from ropool.errors import RopoolError

HEADS = ("32x8x128", "128x512+64")
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the options of `ropool tune`."""
    parser = subparsers.add_parser(
        "tune",
        help="find the best layouts of the kernels on this GPU",
        description=f"{__doc__} Lists are separated by commas.",
    )
    add = parser.add_argument
    add("--op", metavar="OPS", help=f"of {', '.join(OPS)} (all)")
    add("--heads", metavar="FORMS", help=f"HqxHkxD, HqxL+R for the MLA ops ({','.join(HEADS)})")
    add("--dtype", metavar="DTYPES", help=f"of the model, of {', '.join(DTYPES)} (bfloat16)")
    add("--variant", metavar="NAMES", help=f"of {', '.join(VARIANTS)} (all)")
    add("--tokens", metavar="T,T", help=f"({','.join(map(str, TOKENS))})")
    add("--backend", default="cuda", metavar="NAME", help="(%(default)s)")
    add(
        "--out",
        type=Path,
        default=tuning.user_folder(),
        metavar="DIR",
        help="the folder of the table (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a line for each call, and write the table after each."""
    if not torch.cuda.is_available():
        raise RopoolError("tune: PyTorch sees no GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    tokens = numbers(args.tokens) or list(TOKENS)
    path: Path | None = None
    for found, table in tune(args.backend, device, subjects(args), tokens):
        gain = found.before_us / found.best_us
        words = " ".join(f"{name}={value}" for name, value in found.choice.items())
        print(
            f"{found.subject.describe()} T={found.tokens}: {found.before_us:.2f} ->"
            f" {found.best_us:.2f} us ({gain:.2f}x) {words}",
            flush=True,
        )
        path = tuning.write(table, args.out)
    print(f"wrote {path}")
    return 0


def subjects(args: argparse.Namespace) -> list[Subject]:
    """What was asked for. Raises `RopoolError` when nothing goes together."""
    ops = listed(args.op) or list(OPS)
    for op in ops:
        if op not in OPS:
            raise RopoolError(f"tune: op is {op!r}; known: {', '.join(OPS)}")
    dtypes = listed(args.dtype) or ["bfloat16"]
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise RopoolError(f"tune: dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    found = [
        subject(op, heads, dtype, variant)
        for op in ops
        for heads in listed(args.heads) or HEADS
        for dtype in dtypes
        for variant in listed(args.variant) or VARIANTS
    ]
    chosen = [one for one in found if one is not None]
    if not chosen:
        raise RopoolError("tune: these ops, heads and variants do not go together")
    return chosen
