"""`benchmarks/peers.py` on archives made here: what it keeps, what it puts in place of the rest."""

from __future__ import annotations

import importlib.util
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers.py"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unpack_peers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sglang_keeps_its_kernels_alone(peers: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "sglang.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sglang/__init__.py", "import server")
        archive.writestr("sglang/srt/server.py", "")
        archive.writestr("sglang/kernels/ops/rope.py", "from sglang.kernels import x, sglang_y")
        archive.writestr("sglang/kernels/jit/rope.cuh", "code")
        archive.writestr("sglang/kernels/jit/benchmark/big.py", "")
        archive.writestr("sglang-1.0.dist-info/METADATA", "Name: sglang")
    peers.sglang(wheel, tmp_path, "sglang")
    peers.sglang(wheel, tmp_path, "sglang_0_5_20")
    new, old = tmp_path / "sglang", tmp_path / "sglang_0_5_20"
    assert (new / "__init__.py").read_text() == ""
    assert (new / "kernels/jit/rope.cuh").read_text() == "code"
    assert not (new / "srt/server.py").exists() and not (new / "kernels/jit/benchmark").exists()
    assert "sglang_0_5_20.kernels import x, sglang_y" in (old / "kernels/ops/rope.py").read_text()
    assert [path.name for path in tmp_path.glob("*.dist-info")] == ["sglang-1.0.dist-info"]


def test_vllm_registers_what_the_bench_calls(peers: ModuleType, tmp_path: Path) -> None:
    csrc = tmp_path / "vllm-1.0" / "csrc"
    csrc.mkdir(parents=True)
    names = [op for ops in peers.VLLM_OPS.values() for op in ops]
    bindings = "".join(f'ops.def("{op}(Tensor x) -> ()");\n' for op in [*names, "other"])
    bindings += "".join(f'ops.impl("{op}", TORCH_BOX(&{op}));\n' for op in [*names, "other"])
    (csrc / "torch_bindings.cpp").write_text(bindings)
    (csrc / "ops.h").write_text("declarations")
    (csrc / "cache_kernels.cu").write_text("kernels")
    (csrc / "other.cu").write_text("kernels")
    archive = tmp_path / "vllm-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "vllm-1.0", arcname="vllm-1.0")
    peers.vllm(archive, tmp_path / "vllm")
    kept = sorted(path.name for path in (tmp_path / "vllm" / "csrc").iterdir())
    assert kept == ["bindings.cu", "cache_kernels.cu", "ops.h"]
    written = (tmp_path / "vllm" / "csrc" / "bindings.cu").read_text()
    assert all(f'ops.def("{op}(' in written and f'ops.impl("{op}"' in written for op in names)
    assert "other" not in written
    with pytest.raises(SystemExit, match="have no"):
        peers.block(bindings, r'ops\.def\(\s*"absent\(')
