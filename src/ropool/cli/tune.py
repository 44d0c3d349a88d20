"""`ropool tune`: measure how the kernels are best laid out on this GPU, and remember it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ropool import dispatch
from ropool.bench.scratch import VARIANTS, Subject, subject
from ropool.bench.tune import tune
from ropool.bench.workload import DTYPES
from ropool.cli import probes
from ropool.cli.bench import listed, numbers
from ropool.dispatch import OPS, tuning
from ropool.errors import RopoolError

HEADS = ("32x8x128", "128x512+64")
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
MLX_HEADS = ("9x3x64", "32x8x128", "16x2x128", "28x4x128")
MLX_TOKENS = (1, 8, 32, 128, 512, 2048)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the options of `ropool tune`."""
    parser = subparsers.add_parser(
        "tune",
        help="find the best layouts of the kernels on this GPU",
        description=f"{__doc__} Lists are separated by commas.",
    )
    add = parser.add_argument
    add("--op", metavar="OPS", help=f"of {', '.join(OPS)} (all)")
    add(
        "--heads",
        metavar="FORMS",
        help=f"HqxHkxD, HqxHkxD/R to rotate R dims, HqxL+R for the MLA ops ({','.join(HEADS)})",
    )
    add("--dtype", metavar="DTYPES", help=f"of the model, of {', '.join(DTYPES)} (bfloat16)")
    add(
        "--variant", metavar="NAMES", help=f"of {', '.join(VARIANTS)}, or several joined by + (all)"
    )
    add("--tokens", metavar="T,T", help=f"({','.join(map(str, TOKENS))})")
    add("--mlx", action="store_true", help="MLX's kernels instead, beside its own operations")
    add("--backend", metavar="NAME", help="(cuda on NVIDIA GPUs, triton on others)")
    add(
        "--out",
        type=Path,
        default=tuning.user_folder(),
        metavar="DIR",
        help="the folder of the table (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a line for each call, and write the table after each."""
    if args.mlx:
        return run_mlx(args)
    device = gpu()
    wanted, tokens = subjects(args), numbers(args.tokens, "tune") or list(TOKENS)
    backend = usable(args.backend or ("cuda" if torch.version.cuda else "triton"))
    check_out(args.out)
    path: Path | None = None
    for found, table in tune(backend, device, wanted, tokens):
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


def run_mlx(args: argparse.Namespace) -> int:
    """Time the MLX kernels and MLX's own operations, and write which are used at each shape."""
    try:
        from ropool.mlx import tune as mlx_tune
    except ModuleNotFoundError as error:
        raise RopoolError(
            f"tune --mlx needs the package {error.name}, which is not installed: "
            "pip install 'ropool[mlx]'"
        ) from error
    forms = []
    for form in listed(args.heads) or MLX_HEADS:
        numbers_of = form.split("x")
        if len(numbers_of) != 3 or not all(part.isdigit() and int(part) for part in numbers_of):
            raise RopoolError(f"tune: heads are {form!r}; allowed with --mlx: HqxHkxD")
        heads_q, heads_kv, head_dim = map(int, numbers_of)
        if heads_q % heads_kv or head_dim % 2:
            raise RopoolError(
                f"tune: heads are {form!r}; allowed with --mlx: Hq a multiple of Hk, and an even D"
            )
        forms.append((heads_q, heads_kv, head_dim))
    dtypes = listed(args.dtype) or ["bfloat16"]
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise RopoolError(f"tune: dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    tokens = numbers(args.tokens, "tune") or list(MLX_TOKENS)
    check_out(args.out)
    path: Path | None = None
    for found, table in mlx_tune.tune(forms, dtypes, tokens):
        gain = found.built_in_us / found.fused_us
        print(
            f"{'x'.join(map(str, found.heads))} {found.dtype} T={found.tokens}: MLX"
            f" {found.built_in_us:.1f} us, kernel {found.fused_us:.1f} us ({gain:.2f}x)",
            flush=True,
        )
        if table.device == "cpu":  # a name that says nothing of the machine
            table.measured_with["processor"] = probes.cpu_model()
        path = tuning.write(table, args.out)
    print(f"wrote {path}")
    return 0


def gpu() -> torch.device:
    """The current GPU. Raises `RopoolError` when there is none."""
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            return torch.device(kind, module.current_device())
    raise RopoolError("tune: PyTorch sees no GPU")


def usable(backend: str) -> str:
    """`backend`, where it can run in this process. Raises `RopoolError` for another."""
    known = [spec.name for spec in dispatch.backends()]
    if backend not in known:
        raise RopoolError(f"tune: backend is {backend!r}; known: {', '.join(known)}")
    reason = dispatch.unavailable(backend)
    if reason is not None:
        raise RopoolError(f"tune: backend {backend} cannot be used: {reason}")
    return backend


def check_out(folder: Path) -> None:
    """Raise `RopoolError` where no table can be written, before anything is measured."""
    try:
        tuning.writable(folder)
    except OSError as error:
        raise RopoolError(f"tune: cannot write to {folder} (--out): {error.strerror}") from error


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
