"""The cache of compiled kernels on disk: what is read back, and what never is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ropool.backends.cuda import compile


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Texts that were compiled, in order; code is their bytes in capitals."""
    texts: list[str] = []

    def fake(text: str, arch: str) -> bytes:
        texts.append(text)
        return (text.upper() * 1000).encode()

    monkeypatch.setenv("ROPOOL_CUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "compile_cubin", fake)
    monkeypatch.setattr(compile, "compiler_version", lambda: (13, 0))
    return texts


def entries() -> list[Path]:
    folder = compile.cache_folder()
    assert folder is not None
    return sorted(folder.iterdir())


def test_an_entry_is_read_back(compiled: list[str]) -> None:
    first = compile.cubin("a", "sm_90")
    assert compile.cubin("a", "sm_90") == first
    assert compiled == ["a"]
    assert [stat.S_IMODE(p.stat().st_mode) for p in entries()] == [0o600]
    assert stat.S_IMODE(entries()[0].parent.stat().st_mode) == 0o700


def test_source_architecture_and_compiler_are_told_apart(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, arch in (("a", "sm_90"), ("b", "sm_90"), ("a", "sm_80")):
        compile.cubin(text, arch)
    monkeypatch.setattr(compile, "compiler_version", lambda: (13, 1))
    compile.cubin("a", "sm_90")
    assert len(compiled) == len(entries()) == 4


@pytest.mark.parametrize("keep", [0, 5, 32, 100, -1])
def test_a_truncated_entry_is_compiled_again(compiled: list[str], keep: int) -> None:
    whole = compile.cubin("a", "sm_90")
    entry = entries()[0]
    entry.write_bytes(entry.read_bytes()[:keep])
    assert compile.cubin("a", "sm_90") == whole
    assert compile.cubin("a", "sm_90") == whole
    assert compiled == ["a", "a"]


def test_an_entry_that_others_can_write_is_not_read(compiled: list[str]) -> None:
    compile.cubin("a", "sm_90")
    entries()[0].chmod(0o622)
    compile.cubin("a", "sm_90")
    assert compiled == ["a", "a"]


def test_an_entry_of_another_user_is_not_read(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile.cubin("a", "sm_90")
    folder = compile.cache_folder()
    monkeypatch.setattr(compile, "cache_folder", lambda: folder)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    compile.cubin("a", "sm_90")
    assert compiled == ["a", "a"]


def test_a_link_is_not_followed(compiled: list[str], tmp_path: Path) -> None:
    compile.cubin("a", "sm_90")
    entry = entries()[0]
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    compile.cubin("a", "sm_90")
    assert compiled == ["a", "a"]


def test_a_folder_that_others_can_enter_is_not_used(compiled: list[str]) -> None:
    compile.cubin("a", "sm_90")
    folder = entries()[0].parent
    folder.chmod(0o755)
    assert compile.cache_folder() is None
    compile.cubin("a", "sm_90")
    assert compiled == ["a", "a"]


def test_an_empty_variable_means_the_default(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROPOOL_CUDA_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile.cache_folder() == tmp_path / "ropool" / "cuda"


def test_why_nothing_is_kept(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    assert compile.cache_place() == (folder, None)
    folder.chmod(0o755)
    assert compile.cache_place() == (
        folder,
        "others can enter it (mode 0755); chmod 700 mends it",
    )
    folder.chmod(0o700)
    for variable, words in (("link", "it is a link"), ("link/file/cache", "it cannot be made")):
        (folder / "file").touch()
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.setenv("ROPOOL_CUDA_CACHE", str(tmp_path / variable))
        reason = compile.cache_place()[1]
        assert reason is not None and reason.startswith(words)
    monkeypatch.setenv("ROPOOL_CUDA_CACHE", str(folder))
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert compile.cache_place()[1] == "it belongs to another user"


def test_a_cache_that_cannot_be_made_costs_a_compilation(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROPOOL_CUDA_CACHE", str(tmp_path / "file" / "cache"))
    assert compile.cache_folder() is None
    compile.cubin("a", "sm_90")
    compile.cubin("a", "sm_90")
    assert compiled == ["a", "a"]


def test_a_cache_that_cannot_be_written_costs_a_compilation(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(compile.tempfile, "mkstemp", refuse)
    compile.cubin("a", "sm_90")
    compile.cubin("a", "sm_90")
    assert compiled == ["a", "a"]
    assert entries() == []


def test_threads_that_write_at_once_leave_whole_entries(compiled: list[str]) -> None:
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(compile.cubin("a", "sm_90")))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == {("A" * 1000).encode()}
    before = len(compiled)
    compile.cubin("a", "sm_90")
    assert len(compiled) == before
    assert len(entries()) == 1


_WRITER = """
import sys
from ropool.backends.cuda import compile
compile.compiler_version = lambda: (13, 0)
compile.compile_cubin = lambda text, arch: (text * 200_000).encode()
for _ in range(40):
    for entry in compile.cache_folder().glob("[0-9a-f]*"):
        entry.unlink(missing_ok=True)
    for text in "abc":
        assert compile.cubin(text, "sm_90") == (text * 200_000).encode()
"""


def test_two_processes_share_the_cache(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "ROPOOL_CUDA_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    tmp_path.chmod(0o700)
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER], env=environment) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
