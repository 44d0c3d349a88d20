"""Puts what `ropool bench` calls of SGLang, FlashInfer and vLLM into a folder for PYTHONPATH, for a
machine on which these packages cannot be installed whole:

    python benchmarks/peers.py --to .peers     # needs pip and the network, no GPU
    PYTHONPATH=.peers ropool bench --device cuda --suite gpu --out DIR

The packages' wheels are downloaded by pip and unpacked; of each only the kernels and the modules
around them are kept, and modules that would import the rest of the package are replaced by the few
lines that the kernels need of them. The kernels compile on first use with nvcc and ninja; vLLM's
are compiled by `python .peers/vllm/build.py` on the machine with the GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

SGLANG, OLD_SGLANG = "sglang==0.5.23", "sglang==0.5.20"
FLASHINFER, TVM_FFI, VLLM = "flashinfer-python==0.7.2", "apache-tvm-ffi==0.1.11", "vllm==0.33.0"
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 28, 24, 17)] + ["manylinux2014_x86_64"]
STUBS = {
    "__init__.py": "",
    "utils.py": "def is_in_ci():\n    return False\n",
    "srt/__init__.py": "",
    "srt/utils/__init__.py": "def is_npu():\n    return False\n",
    "srt/utils/common.py": (
        "import torch\n\n\ndef is_cuda():\n    return torch.version.cuda is not None\n"
    ),
    "srt/utils/custom_op.py": (
        "def register_custom_op(fn=None, **options):\n"
        "    return fn if fn is not None else lambda function: function\n"
    ),
}
"""SGLang's modules that stand in for what imports its server."""
FLASHINFER_FILES = re.compile(
    r"flashinfer/((jit|trace)/.*|(rope|page|utils|api_logging|compilation_context|fi_trace|version|artifacts"
    r"|_build_meta|cake_fused_qk_rope(_fp8)?_append)\.py|data/(include|spdlog|cccl)/.*"
    r"|data/csrc/(rope|page|flashinfer_rope_binding|flashinfer_page_binding)\.cu"
    r"|data/csrc/[^/]*\.(h|inc|cuh)|data/csrc/cake_fused_qk_rope(_fp8)?_append/(sm_90a/)?[^/]*)"
)
VLLM_SOURCES = ("cache_kernels", "pos_encoding_kernels", "fused_qknorm_rope_cache_kernel")
VLLM_OPS = {
    "_C": ("rotary_embedding", "fused_qknorm_rope_cache"),
    "_C_cache_ops": ("reshape_and_cache_flash", "concat_and_cache_mla"),
}
VLLM_LOADER = '''"""Loads the compiled kernels, which register themselves with PyTorch."""
from pathlib import Path

import torch

torch.ops.load_library(str(Path(__file__).parent / "kernels.so"))
'''
VLLM_BUILD = '''"""Compiles the kernels beside this file: python build.py"""
import sys
from pathlib import Path
from subprocess import check_call

import torch
from torch.utils.cpp_extension import CUDA_HOME, include_paths

HERE = Path(__file__).parent
CSRC = HERE / "csrc"
flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-DUSE_CUDA",
         "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DENABLE_FP8", f"-I{CSRC}",
         "-gencode=arch=compute_90a,code=sm_90a"]
flags += [f"-I{path}" for path in include_paths("cuda")]
units = sorted(HERE.glob("csrc/*.cu"))
from concurrent.futures import ThreadPoolExecutor

def build(unit):
    target = unit.with_suffix(".o")
    check_call([f"{CUDA_HOME}/bin/nvcc", *flags, "-c", str(unit), "-o", str(target)])

with ThreadPoolExecutor() as pool:
    list(pool.map(build, units))
lib = Path(torch.__file__).parent / "lib"
check_call([f"{CUDA_HOME}/bin/nvcc", "-shared", "-o", str(HERE / "kernels.so"),
            *[str(unit.with_suffix(".o")) for unit in units], f"-L{lib}", "-ltorch", "-ltorch_cpu",
            "-ltorch_cuda", "-lc10", "-lc10_cuda", f"-L{CUDA_HOME}/lib64/stubs", "-lcuda"])
torch.ops.load_library(str(HERE / "kernels.so"))
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--to", type=Path, default=Path(".peers"))
    parser.add_argument("--downloads", type=Path, help="keep the downloads here")
    arguments = parser.parse_args()
    to: Path = arguments.to
    shutil.rmtree(to, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        downloads = arguments.downloads or Path(scratch)
        downloads.mkdir(parents=True, exist_ok=True)
        sglang(download(SGLANG, downloads), to, "sglang")
        sglang(download(OLD_SGLANG, downloads), to, "sglang_0_5_20")
        unpack(download(FLASHINFER, downloads), to, FLASHINFER_FILES)
        (to / "flashinfer/__init__.py").write_text("")
        for package in (TVM_FFI, "msgspec"):
            unpack(download(package, downloads), to, re.compile(r".*"))
        vllm(download_source(VLLM, downloads), to / "vllm")


def download(package: str, folder: Path) -> Path:
    """The wheel of a package."""
    pip(["--only-binary=:all:", f"--python-version={PYTHON}", *platforms(), package], folder)
    return newest(folder, package, "*.whl")


def download_source(package: str, folder: Path) -> Path:
    """The source archive of a package; pip reads its metadata with what is installed here, which
    takes setuptools, setuptools-scm, setuptools-rust, jinja2 and torch."""
    number = package.partition("==")[2]
    environment = os.environ | {"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": number}
    if not list(folder.glob("vllm-*.tar.gz")):
        pip(["--no-binary=:all:", "--no-build-isolation", package], folder, environment)
    return newest(folder, package, "*.tar.gz")


def pip(arguments: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), *arguments], check=True, env=environment)


def platforms() -> list[str]:
    return [f"--platform={platform}" for platform in PLATFORMS]


def newest(folder: Path, package: str, pattern: str) -> Path:
    name, _, number = package.partition("==")
    prefix = f"{name.replace('-', '_')}-{number}"
    return next(path for path in sorted(folder.glob(pattern)) if path.name.startswith(prefix))


def unpack(wheel: Path, to: Path, wanted: re.Pattern[str]) -> None:
    """The files of a wheel whose names match, and what says its version."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if wanted.fullmatch(name) or ".dist-info/METADATA" in name:
                archive.extract(name, to)


def sglang(wheel: Path, to: Path, package: str) -> None:
    """The kernels of an SGLang release under the name `package`."""
    with tempfile.TemporaryDirectory() as scratch:
        kept = re.compile(
            r"sglang/(srt/environ\.py|kernels/(?!cake_|kda_|plugin_|jit/benchmark).*)"
        )
        unpack(wheel, Path(scratch), kept)
        source, target = Path(scratch) / "sglang", to / package
        shutil.copytree(source, target)
        if package == "sglang":
            for info in Path(scratch).glob("*.dist-info"):
                shutil.copytree(info, to / info.name)
    write(STUBS.items(), target)
    if package != "sglang":
        for path in target.rglob("*.py"):
            path.write_text(re.sub(r"\bsglang\.", f"{package}.", path.read_text()))


def vllm(archive: Path, to: Path) -> None:
    """The sources of vLLM's kernels, and the registration of the ops that the bench calls, taken
    from vLLM's own."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if "/csrc/" in m.name]
            tar.extractall(scratch, members, filter="data")
        csrc = next(Path(scratch).glob("vllm-*/csrc"))
        for path in csrc.rglob("*"):
            wanted = path.suffix in (".h", ".cuh", ".hpp") or path.stem in VLLM_SOURCES
            if path.is_file() and wanted and "cpu" not in path.parts:
                target = to / "csrc" / path.relative_to(csrc)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        bindings = (csrc / "torch_bindings.cpp").read_text()
    lines = ['#include "ops.h"', "#include <torch/csrc/stable/library.h>"]
    for library, ops in VLLM_OPS.items():
        schemas = [block(bindings, rf'ops\.def\(\s*"{op}\(') for op in ops]
        implementations = [block(bindings, rf'ops\.impl\("{op}"') for op in ops]
        lines += [f"STABLE_TORCH_LIBRARY_FRAGMENT({library}, ops) {{", *schemas, "}"]
        lines += [f"STABLE_TORCH_LIBRARY_IMPL({library}, CUDA, ops) {{", *implementations, "}"]
    write(
        {
            "csrc/bindings.cu": "\n".join(lines) + "\n",
            "__init__.py": "",
            "_C_stable_libtorch.py": VLLM_LOADER,
            "build.py": VLLM_BUILD,
        }.items(),
        to,
    )


def block(text: str, start: str) -> str:
    """The statement that begins where `start` matches."""
    match = re.search(start, text)
    if match is None:
        raise SystemExit(f"benchmarks/peers.py: vLLM's bindings have no {start}")
    return text[match.start() : text.index(";\n", match.start()) + 1]


def write(files: Iterable[tuple[str, str]], folder: Path) -> None:
    for name, content in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


if __name__ == "__main__":
    main()
