"""`ropool doctor`: the machine, the backends, and for each op every kernel with chosen or why
not."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import ropool
from ropool import dispatch
from ropool.backends import cpu
from ropool.backends.cuda import compile
from ropool.cli import probes
from ropool.dispatch import Device, settings
from ropool.ops._device import device_of

MLX = "mlx"
"""The device of models that run on MLX; PyTorch knows nothing of it."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the options of `ropool doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="report this machine, the backends, and the kernel chosen for each op",
        description=__doc__,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report. A probe that fails is part of it, so the exit code is always 0."""
    found = report()
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def report() -> dict[str, Any]:
    """The whole report in plain values, as `--json` prints it."""
    machine = probes.machine()
    return {
        "ropool": ropool.__version__,
        "machine": machine,
        "settings": probes.guarded(current_settings),
        "backends": [backend(spec.name) for spec in dispatch.backends()],
        "kernels": [
            kernel
            for device in devices(machine["accelerators"])
            for op in ops_of(device)
            for kernel in kernels(op, device)
        ],
    }


def current_settings() -> dict[str, Any]:
    """The settings in force, by the name of their environment variable."""
    current = settings.current()
    return {"ROPOOL_BACKEND": current.backend, "ROPOOL_CHECK": current.check}


def backend(name: str) -> dict[str, Any]:
    """Whether a backend can be used in this process, or why not and what to do about it."""
    reason = probes.guarded(lambda: dispatch.unavailable(name))
    found = {"backend": name, "available": reason is None, "reason": reason, "hint": None}
    if name == "cpu" and reason is None:
        found["isa"] = probes.guarded(cpu.isa)
    elif name == "cuda" and reason is None:
        found["cache"] = probes.guarded(cuda_cache)
    elif name == "cpu":
        found["hint"] = probes.guarded(probes.how_to_build)
    return found


def cuda_cache() -> str:
    """Where compiled CUDA kernels are kept, or why they are not."""
    folder, reason = compile.cache_place()
    return f"kept in {folder}" if reason is None else f"not kept in {folder}: {reason}"


def devices(accelerators: Any) -> list[str]:
    """The CPU and one device of each kind of accelerator."""
    found = {"cpu": "cpu"}
    for accelerator in accelerators if isinstance(accelerators, list) else []:
        found.setdefault(accelerator["device"].partition(":")[0], accelerator["device"])
    if probes.guarded(lambda: dispatch.unavailable("mlx")) is None:
        found[MLX] = MLX
    return list(found.values())


def ops_of(device: str) -> list[str]:
    """The ops that are called on a device: on MLX those that have a kernel for it."""
    if device != MLX:
        return list(dispatch.OPS)
    return [op for op in dispatch.OPS if any(MLX in spec.devices for spec in dispatch.kernels(op))]


def kernels(op: str, device: str) -> list[dict[str, Any]]:
    """Every kernel of `op` for `device`, the most preferred first."""
    try:
        where = Device(MLX) if device == MLX else device_of(torch.device(device))
        reports = dispatch.explain(op, where, None)
    except Exception as error:
        reason = f"unknown ({type(error).__name__}: {error})"
        labels = [(spec.label, False, reason) for spec in dispatch.kernels(op)]
    else:
        labels = [(entry.kernel.label, entry.chosen, entry.reason) for entry in reports]
    return [
        {"device": device, "op": op, "kernel": label, "chosen": chosen, "reason": reason or None}
        for label, chosen, reason in labels
    ]


def as_text(found: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"ropool {found['ropool']}", "", "machine"]
    lines += table([(name, shown(value)) for name, value in found["machine"].items()])
    lines += ["", "settings"]
    current = found["settings"]
    rows = current.items() if isinstance(current, dict) else [("settings", current)]
    lines += table([(name, shown(value)) for name, value in rows])
    lines += ["", "backends"]
    for entry in found["backends"]:
        state = "available" if entry["available"] else f"not available: {entry['reason']}"
        if isinstance(isa := entry.get("isa"), dict):
            state += f", instruction set {isa['chosen']} of {' '.join(isa['available'])}"
        if "cache" in entry:
            state += f", compiled kernels {entry['cache']}"
        lines += table([(entry["backend"], state)])
        if entry["hint"]:
            lines.append(f"    {entry['hint']}")
    for device in dict.fromkeys(entry["device"] for entry in found["kernels"]):
        lines += ["", f"kernels on {device}"]
        lines += table(
            [
                (entry["op"], entry["kernel"], "chosen" if entry["chosen"] else entry["reason"])
                for entry in found["kernels"]
                if entry["device"] == device
            ]
        )
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value of the report in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item or '-'}" for name, item in value.items())
    if isinstance(value, list):
        items = [" ".join(item.values()) for item in value]
        return ", ".join(items) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not set" if value is None else str(value)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows with their columns aligned and the repeated first column left out."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    widths[:1] = [max(widths[0], 14)] if widths else []
    lines = []
    before = ""
    for row in rows:
        first = "" if row[0] == before else row[0]
        before = row[0]
        cells = [first, *row[1:]]
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)]
        lines.append("  " + "  ".join([*padded, cells[-1]]).rstrip())
    return lines
