"""scikit-build-core, after a look at the machine: pip would otherwise fail to find MLX on one that
has none, and say nothing of why."""

from __future__ import annotations

import platform
import sys
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403


def check_machine() -> None:
    """End the build with one line on a machine that MLX does not run on."""
    system, processor = platform.system(), platform.machine()
    if system == "Darwin" and processor != "arm64":
        sys.exit(
            f"ropool-metal needs Apple silicon, this Python is for {processor} (an Intel Mac, or "
            "Rosetta): with an arm64 Python, arch -arm64 python3 -m pip install ./metal"
        )
    if system not in ("Darwin", "Linux"):
        sys.exit(f"ropool-metal is for macOS and Linux, not for {system}: pip install ropool")


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """Refused: no archive of this folder has ../csrc, the kernels that the CPU runs."""
    sys.exit(
        "ropool-metal is built from a clone, since it compiles ../csrc too; there is no sdist: "
        "pip install ./metal, or for a wheel: pip wheel --no-deps ./metal"
    )


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Ends before anything is installed for it."""
    build_sdist("")
    return []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What to install before the build: MLX too, whose headers and library it needs."""
    check_machine()
    mlx = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
    base = _build.get_requires_for_build_wheel(config_settings)
    return [*base, "nanobind==3.1.0", f"{mlx}==0.32.4"]


get_requires_for_build_editable = get_requires_for_build_wheel
