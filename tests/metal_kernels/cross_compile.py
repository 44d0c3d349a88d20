"""Compiles what only a Mac runs, with the clang of the package `ziglang`:

    python -m metal_kernels.cross_compile FOLDER

The kernels are checked as C++ for OpenCL, whose address spaces are Metal's; the host code is
compiled for macOS on arm64 against the headers of MLX's macOS wheel, which pip puts into FOLDER,
and linked with its library. Run by `make verify-metal`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from metal_kernels.compiler import HERE, METAL, zig

CORE = METAL.parent / "csrc"
HOST = ("rope_pool.cpp", "eval_cpu.cpp", "eval_gpu.cpp")
CORE_SOURCES = (
    *("gnu_openmp.cpp", "isa.cpp", "kernels_baseline.cpp", "kernels_neon.cpp"),
    *("plan.cpp", "pool_rows.cpp", "run.cpp", "thread_pool.cpp"),
)
TARGET = ("-target", "aarch64-macos.14.0", "-std=c++20", "-O1", "-Wall", "-Wextra")


def mlx_version() -> str:
    """The release of MLX that the package is built for."""
    text = (METAL / "src" / "ropool_metal" / "_version.py").read_text()
    found = re.search(r'MLX_VERSION = "(.*)"', text)
    assert found is not None
    return found[1]


def kernels_as_opencl(folder: Path) -> Path:
    """The kernels in a form that C++ for OpenCL takes: Metal's attributes left out, and a value for
    every function constant."""
    text = (METAL / "kernels" / "rope_pool.metal").read_text()
    text = re.sub(r"\[\[function_constant\(\d+\)\]\]", "= 1", text)
    text = re.sub(r"\[\[[^\]]*\]\]", "", text)
    path = folder / "rope_pool.clcpp"
    path.write_text(text)
    return path


def check_kernels(folder: Path) -> None:
    """Check the types and the address spaces of every instance of every kernel."""
    include = [f"-I{path}" for path in (HERE / "opencl", METAL / "kernels")]
    flags = ("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "--target=spir64", "-Werror")
    source = str(kernels_as_opencl(folder))
    zig("clang", *flags, "-D__METAL_VERSION__=310", *include, "-fsyntax-only", source)


def mac_wheel(folder: Path) -> Path:
    """The unpacked `mlx` folder of MLX's macOS wheel."""
    unpacked = folder / f"mlx-metal-{mlx_version()}"
    if not unpacked.is_dir():
        platform = ("--platform", "macosx_14_0_arm64", "--only-binary=:all:", "--no-deps")
        wheel = f"mlx-metal=={mlx_version()}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", *platform]
        subprocess.run([*pip, "--dest", str(folder), wheel], check=True)
        [path] = folder.glob(f"mlx_metal-{mlx_version()}-*.whl")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(unpacked)
    return unpacked / "mlx"


def compile_host(folder: Path) -> None:
    """Compile and link the host code for a Mac. Python's part of it needs Python's headers for a
    Mac, and is left out."""
    mlx = mac_wheel(folder)
    foreign = (mlx / "include", mlx / "include" / "metal_cpp", HERE / "mac_headers")
    include = [f"-I{CORE}", *(word for path in foreign for word in ("-isystem", str(path)))]
    sources = [METAL / "csrc" / name for name in HOST]
    sources += [CORE / "cpu" / name for name in CORE_SOURCES]
    objects = []
    for source in sources:
        made = folder / f"{source.stem}.o"
        zig("c++", *TARGET, "-D_METAL_", *include, "-c", str(source), "-o", str(made))
        objects.append(str(made))
    # Of Apple's own libraries only this one is named by what metal-cpp inlines.
    stub = folder / "objc.c"
    stub.write_text("void objc_msgSend(void) {}\n")
    objects += ["-x", "c", str(stub), "-x", "none", str(mlx / "lib" / "libmlx.dylib")]
    made = folder / "linked.dylib"
    zig("c++", *TARGET[:2], "-shared", "-Wno-everything", *objects, "-o", str(made))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    check_kernels(folder)
    print("kernels: types and address spaces are right")
    compile_host(folder)
    print(f"host code: compiles and links for macOS arm64 with MLX {mlx_version()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
