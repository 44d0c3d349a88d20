"""What `ropool doctor` finds out about the machine.

A probe that fails says so in its own place, and no other is touched by it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

X86_FLAGS = "sse4_2 avx avx2 f16c fma avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512_fp16"
ARM_FLAGS = "asimd asimdhp bf16 sve sve2"


def guarded(probe: Callable[[], Any]) -> Any:
    """What `probe` finds, or why it found nothing."""
    try:
        return probe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def process_seconds() -> float | None:
    """Seconds since this process began, imports and all; `None` where the system does not tell.

    To 10 ms, the tick in which Linux keeps the start of a process.
    """
    status = Path("/proc/self/stat")
    if not status.is_file():
        return None
    # The fields after the command's name, which may hold spaces itself; the start is the 22nd.
    ticks = int(status.read_text().rpartition(")")[2].split()[19])
    started = ticks / os.sysconf("SC_CLK_TCK")
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 2)


def machine() -> dict[str, Any]:
    """The facts about this machine that decide which kernels run, and how fast."""
    probes: dict[str, Callable[[], Any]] = {
        "system": lambda: f"{platform.system()} {platform.release()}",
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "cpu": cpu_model,
        "isa": cpu_isa,
        "cores": cores,
        "memory_gib": memory_gib,
        "torch": lambda: torch.__version__,
        "torch_threads": torch.get_num_threads,
        "accelerators": accelerators,
        "packages": packages,
    }
    return {name: guarded(probe) for name, probe in probes.items()}


def cpu_info(field: str) -> str:
    """The first value of `field` in /proc/cpuinfo, or an empty string."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def cpu_model() -> str:
    """The processor's product name, or its architecture where the system tells no name."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if platform.system() == "Linux":
        return cpu_info("model name") or platform.machine()
    return platform.processor() or platform.machine()


def cpu_isa() -> str:
    """The architecture and those of its vector extensions that kernels are written for."""
    found = []
    if platform.system() == "Linux":
        flags = set((cpu_info("flags") or cpu_info("Features")).split())
        found = [flag for flag in f"{X86_FLAGS} {ARM_FLAGS}".split() if flag in flags]
    return " ".join([platform.machine(), *found])


def cores() -> int:
    """The logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float:
    """The machine's memory."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def accelerators() -> list[dict[str, str]]:
    """The accelerators that this PyTorch can use, as `device` and `name`."""
    found = []
    for index in range(torch.cuda.device_count()):
        found.append({"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index)})
    for index in range(torch.xpu.device_count()):
        found.append({"device": f"xpu:{index}", "name": torch.xpu.get_device_name(index)})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.machine()})
    return found


def packages() -> dict[str, str | None]:
    """The versions of the optional packages; `None` for one that is not installed."""
    return {name: version(name) for name in ("transformers", "gguf", "triton", "cuda-core", "mlx")}


def version(name: str) -> str | None:
    """The version of an installed distribution, or `None`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def how_to_build() -> str | None:
    """What to run to get the compiled kernels, on an installation that lacks them."""
    if importlib.util.find_spec("ropool._cpu") is not None:
        return None
    python = shlex.quote(sys.executable)
    command = f"{python} -m pip install --force-reinstall --no-deps --no-cache-dir {source()}"
    compilers = (os.environ.get("CXX") or "c++", "g++", "clang++", "cl")
    compiler = next(filter(shutil.which, compilers), None)
    if compiler is None:
        return (
            "no C++ compiler is on the PATH; install one (Debian: apt-get install g++,"
            f" macOS: xcode-select --install), then run: {command}"
        )
    return f"{compiler} can build it now: {command}"


def source() -> str:
    """What to give to pip to install ropool again from where it came: a folder, or its name."""
    direct = guarded(lambda: metadata.distribution("ropool").read_text("direct_url.json"))
    if not direct or direct.startswith("unknown"):
        return "ropool"
    record = json.loads(direct)
    url = urlparse(record.get("url", ""))
    if url.scheme != "file" or url.path.endswith(".whl"):
        return "ropool"
    folder = shlex.quote(unquote(url.path))
    return f"--editable {folder}" if record.get("dir_info", {}).get("editable") else folder
