"""From source text to loaded kernels: NVRTC through `cuda.core`, with a cache on disk.

A cache entry is machine code that will run with the user's rights, so it is only ever read from a
folder that nobody else can write.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
import threading
from importlib import resources
from pathlib import Path
from typing import Any

KERNEL = "ropool_kernel"
_FORMAT = "1"
_UNUSED = 177
"""The warning of names that a specialisation does not use."""
_importing = threading.Lock()
"""`cuda.core` fills itself with names while it is imported; other threads would see it half filled.
"""
_DIGEST_BYTES = hashlib.sha256().digest_size


@functools.cache
def source(name: str) -> str:
    """The text of a kernel file of this package."""
    return resources.files(__package__).joinpath("kernels", name).read_text(encoding="utf-8")


@functools.cache
def compiler_version() -> tuple[int, int]:
    """Version of the NVRTC that `cuda.core` uses."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def compile_cubin(text: str, arch: str) -> bytes:
    """Machine code of `text` for `arch` (such as `sm_90`), compiled here and now.

    Raises `RuntimeError` with the compiler's log.
    """
    with _importing:
        from cuda.core import Program, ProgramOptions

    options = ProgramOptions(name=KERNEL, arch=arch, std="c++17", diag_suppress=_UNUSED)
    try:
        code = Program(text, "c++", options).compile("cubin").code
    except Exception as error:
        raise RuntimeError(f"ropool: NVRTC failed for {arch}: {error}") from error
    return bytes(code)


def cubin(text: str, arch: str) -> bytes:
    """Machine code of `text` for `arch`, from the cache on disk if it is there."""
    question = "\0".join((_FORMAT, arch, repr(compiler_version()), text))
    name = hashlib.sha256(question.encode()).hexdigest()
    folder = cache_folder()
    if folder is not None and (found := _read(folder / name)) is not None:
        return found
    code = compile_cubin(text, arch)
    if folder is not None:
        _write(folder / name, code)
    return code


def cache_folder() -> Path | None:
    """The private folder of compiled kernels, created if need be: `ROPOOL_CUDA_CACHE`, or
    `ropool/cuda` in the user's cache directory. `None` when there is none that can be trusted."""
    folder, reason = cache_place()
    return folder if reason is None else None


def cache_place() -> tuple[Path, str | None]:
    """The folder that is meant for compiled kernels, created if need be, and why none are kept
    there, or `None`."""
    if named := os.environ.get("ROPOOL_CUDA_CACHE"):
        folder = Path(named)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(base, "ropool", "cuda")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        return folder, f"it cannot be made ({error.strerror})"
    if not stat.S_ISDIR(found.st_mode):
        return folder, "it is a link, not a folder"
    if found.st_uid != os.geteuid():
        return folder, "it belongs to another user"
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        return folder, f"others can enter it (mode {mode:04o}); chmod 700 mends it"
    return folder, None


def _read(path: Path) -> bytes | None:
    """The code in a cache entry, or `None` when it is not there, not ours, or not whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            if not ours or found.st_mode & 0o022:
                return None
            content = file.read()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Write a cache entry in one step; other processes see all of it or nothing. A folder that
    cannot be written costs a compilation in each process and is no error."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError:
        return


def load(text: str, arch: str) -> Any:
    """The kernel of `text` as a `cuda.core.Kernel`, which keeps its module loaded."""
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin(text, arch), name=KERNEL).get_kernel(KERNEL)
