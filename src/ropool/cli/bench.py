"""`ropool bench`: time the ops on this machine beside what a user would otherwise run."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ropool
from ropool.bench.decode_models import MODELS
from ropool.bench.measure import Row, measure
from ropool.bench.overhead import overhead
from ropool.bench.provider import Provider
from ropool.bench.providers import choose, providers
from ropool.bench.report import table, write, write_records
from ropool.bench.suites import SUITES, named, takes_part
from ropool.bench.summary import read, summary
from ropool.bench.timing import streaming_copy_gbps
from ropool.bench.workload import (
    DEFAULT_DTYPES,
    DEFAULT_HEADS,
    DEFAULT_TOKENS,
    KV_DTYPES,
    MLA_KV_DTYPES,
    NORMS,
    Workload,
    workloads,
)
from ropool.cli import probes
from ropool.dispatch import OPS
from ropool.errors import RopoolError

DEVICES = ("cpu", "cuda")
DEFAULT_ROUNDS = 21
WRONG_RESULT = 1
BUSY_LOAD = 0.5
MOST_DIGITS = 18


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the options of `ropool bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="time the ops on this machine",
        description=f"{__doc__} Lists are separated by commas.",
        epilog=f"Exit code {WRONG_RESULT}: a provider's result was wrong.",
    )
    add = parser.add_argument
    add("op", nargs="*", metavar="OP", help=f"of {', '.join(OPS)} (all)")
    add("--providers", metavar="A,B", help="(every one that can run on the device)")
    add("--tokens", metavar="T,T", help=f"({','.join(map(str, DEFAULT_TOKENS))})")
    add(
        "--heads",
        metavar="FORMS",
        help=f"HqxHkxD, and HqxL+R for the MLA ops ({','.join(DEFAULT_HEADS)})",
    )
    add("--dtype", metavar="DTYPES", help=f"of the model ({','.join(DEFAULT_DTYPES)})")
    add("--kv-dtype", metavar="DTYPES", help=f"of the pool: {', '.join(MLA_KV_DTYPES)} (auto)")
    add("--q-dtype", metavar="DTYPES", help=f"of the query: {', '.join(KV_DTYPES)} (auto)")
    add("--norm", metavar="A,B", help=f"QK-norm: {', '.join(NORMS)} (off)")
    add("--suite", choices=tuple(SUITES), help="the workloads of the published figures instead")
    add("--device", choices=("auto", *DEVICES), default="auto", help="(a GPU if there is one)")
    add(
        "--rounds",
        type=int,
        default=DEFAULT_ROUNDS,
        metavar="N",
        help="samples a row (%(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="write results.json, results.csv and plots here")
    add(
        "--decode",
        metavar="MODELS",
        help="measure instead a decode step of whole models with random weights, on a GPU, with "
        f"the op and with other kernels in its place: {', '.join(MODELS)}, or all",
    )
    add(
        "--summary",
        type=Path,
        metavar="DIR",
        help="measure nothing; sum up the results.csv of a run on a GPU",
    )
    add(
        "--overhead",
        action="store_true",
        help="measure instead what a call costs that has nothing to do, and where the time goes",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print each workload's table when it is done, and write the files."""
    if args.overhead:
        warned_load()
        found = overhead(device_named(args.device))
        print("\n".join(found.lines()))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "overhead.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
        return 0
    if args.summary is not None:
        path = args.summary / "results.csv"
        if not path.is_file():
            raise RopoolError(f"bench: --summary is {str(args.summary)!r}; no results.csv is there")
        print("\n".join(summary(read(path))))
        return 0
    if args.rounds < 1:
        raise RopoolError(f"bench: --rounds is {args.rounds}; at least 1 is needed")
    if args.decode is not None:
        return decode(args)
    wanted = asked_for(args)
    device = device_named(args.device)
    chosen = choose(listed(args.providers)) or usable(device)
    if args.out is not None:
        # Before the measuring, should it not be installed.
        from ropool.bench.plots import draw
        from ropool.bench.ratio_plot import draw_ratios

        args.out.mkdir(parents=True, exist_ok=True)
    load = warned_load()
    rows: list[Row] = []
    numbered = itertools.count(1)

    def started(workload: Workload) -> None:
        print(f"[{next(numbered)}/{len(wanted)}] {workload.describe()}", flush=True)

    everyone = args.suite is None or args.providers is not None
    takes = (lambda workload, provider: True) if everyone else takes_part
    for group in measure(wanted, chosen, device, args.rounds, started, takes):
        print("\n".join(table(group)), flush=True)
        rows += group
        if args.out is not None:
            write(rows, {}, args.out)  # what is there if the run is cut short
    if args.out is not None:
        described = machine(device, load)
        write(rows, described, args.out)
        title = described["accelerator"] or described["cpu"]
        pictures = draw(rows, args.out, title) + draw_ratios(rows, args.out, title)
        if args.suite is not None:
            (args.out / "summary.md").write_text("\n".join(summary(rows)) + "\n")
        names = ["results.json", "results.csv", "machine.json", *[path.name for path in pictures]]
        print(f"wrote {', '.join(names)} to {args.out}")
    return WRONG_RESULT if any(row.correct is False for row in rows) else 0


def asked_for(args: argparse.Namespace) -> Sequence[Workload]:
    """The workloads of a suite, those of its ops that were named; or what the options say."""
    if args.suite is None:
        return workloads(
            ops=args.op,
            heads=listed(args.heads),
            dtypes=listed(args.dtype),
            kv_dtypes=listed(args.kv_dtype),
            tokens=numbers(args.tokens),
            q_dtypes=listed(args.q_dtype),
            norms=listed(args.norm),
        )
    given = ("heads", "dtype", "kv_dtype", "q_dtype", "norm")
    for name in given:
        if getattr(args, name) is not None:
            raise RopoolError(f"bench: --{name.replace('_', '-')} does not go with --suite")
    tokens = numbers(args.tokens)
    return [
        workload
        for workload in named(args.suite)
        if (not args.op or workload.op in args.op) and (not tokens or workload.tokens in tokens)
    ]


def decode(args: argparse.Namespace) -> int:
    """Measure decode steps, print each, and write them to `decode.csv` and `decode.json`."""
    names = list(MODELS) if args.decode == "all" else listed(args.decode)
    for name in names:
        if name not in MODELS:
            raise RopoolError(f"bench: model {name!r} is unknown; known: {', '.join(MODELS)}, all")
    device = device_named(args.device)
    if device.type != "cuda":
        raise RopoolError("bench: --decode needs a CUDA device")
    from ropool.bench.decode import decode_steps  # needs transformers

    found = []
    for row in decode_steps(names, device, args.rounds):
        print(row.line(), flush=True)
        found.append(asdict(row))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_records(found, args.out / "decode")
    return 0


def warned_load() -> float | None:
    """The load average; a word on stderr when it is too high to measure."""
    load = load_average()
    if load is not None and load > BUSY_LOAD:
        print(
            f"warning: the load average is {load:.1f}; on a busy machine the figures mean little",
            file=sys.stderr,
        )
    return load


def load_average() -> float | None:
    """How busy the machine has been in the last minute, where the system tells. Where others use
    it, threads wait for each other, and times have little to do with the kernels."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def listed(value: str | None) -> list[str]:
    """The items of a comma-separated option."""
    return [item.strip() for item in value.split(",")] if value is not None else []


def numbers(value: str | None, command: str = "bench") -> list[int]:
    """The numbers of tokens of a comma-separated option of `command`."""
    items = listed(value)
    for item in items:
        if not item.isdecimal() or len(item) > MOST_DIGITS or int(item) < 1:
            raise RopoolError(
                f"{command}: tokens is {item!r}; allowed: whole numbers from 1, as 1,16,256"
            )
    return [int(item) for item in items]


def device_named(name: str) -> torch.device:
    """The device to measure on."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RopoolError("bench: --device is cuda, but PyTorch sees no CUDA device")
    return torch.device(name)


def usable(device: torch.device) -> list[Provider]:
    """Every provider that can run here; the others are named with their reason."""
    found = []
    for provider in providers().values():
        reason = provider.unavailable(device)
        if reason is None:
            found.append(provider)
        else:
            print(f"left out: {provider.name}: {reason}")
    return found


def machine(device: torch.device, load: float | None) -> dict[str, Any]:
    """What the figures depend on, without what is private to this installation; `load` is the load
    average before the run."""
    probed: dict[str, Callable[[], Any]] = {
        "cpu": probes.cpu_model,
        "isa": probes.cpu_isa,
        "cores": probes.cores,
        "memory_gib": probes.memory_gib,
        "threads": torch.get_num_threads,
        "streaming_copy_gbps": lambda: (
            round(streaming_copy_gbps(), 1) if device.type == "cpu" else None
        ),
        "accelerator": lambda: (
            torch.cuda.get_device_name(device) if device.type == "cuda" else None
        ),
        "system": lambda: f"{platform.system()} {platform.release()}",
        "python": platform.python_version,
        "torch": lambda: torch.__version__,
        "packages": probes.packages,
    }
    found = {name: probes.guarded(probe) for name, probe in probed.items()}
    return {"ropool": ropool.__version__} | found | {"load_average": load}
