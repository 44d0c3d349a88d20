"""What NVRTC makes of the kernels, for GPUs that need not be there.

`python -m cuda_backend.machine_code` in tests/ writes what has changed of `machine_code.csv`, which
has the kernels of models and of the op tests' grids; tests compare with it.
"""

from __future__ import annotations

import csv
import struct
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_backend.specialisations import ARCHITECTURES, Specialisation, specialisations

TABLE = Path(__file__).with_suffix(".csv")
VERSION = (13, 4)
"""The NVRTC that made the table."""


@dataclass(frozen=True)
class Code:
    """One kernel: registers a thread, and bytes of its stack, where spilled registers go."""

    case: str
    arch: str
    registers: int
    stack: int

    def worse_than(self, other: Code) -> bool:
        return self.registers > other.registers or self.stack > other.stack


def compiled(one: Specialisation, arch: str) -> Code:
    """Compile one kernel for one architecture."""
    from ropool.backends.cuda import compile

    return Code(one.name, arch, **resources(compile.compile_cubin(one.text(arch), arch)))


def recorded() -> dict[tuple[str, str], Code]:
    """The table, by the digest of a kernel's texts and the architecture."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["texts"], arch): Code(row["case"], arch, *map(int, row[arch].split("+")))
        for row in rows
        for arch in ARCHITECTURES
    }


def write() -> None:
    """Write the table. What stands there is not compiled again: a text has but one machine code."""
    known, every = recorded(), specialisations()
    wanted = [(one, arch) for one in every for arch in ARCHITECTURES]
    wanted = [(one, arch) for one, arch in wanted if (one.texts, arch) not in known]
    with ProcessPoolExecutor() as pool:
        ones, archs = [one for one, _ in wanted], [arch for _, arch in wanted]
        codes = pool.map(compiled, ones, archs, chunksize=8)
        for count, ((one, arch), code) in enumerate(zip(wanted, codes, strict=True), 1):
            known[one.texts, arch] = code
            if count % 100 == 0:
                print(f"{count} of {len(wanted)}", file=sys.stderr, flush=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "texts", *ARCHITECTURES])
        for one in every:
            row = [known[one.texts, arch] for arch in ARCHITECTURES]
            codes_of_row = [f"{code.registers}+{code.stack}" for code in row]
            writer.writerow([one.name, one.texts, *codes_of_row])


def resources(cubin: bytes) -> dict[str, int]:
    """`registers` a thread and `stack` bytes of the one kernel in a cubin, from its ELF notes: the
    attributes REGCOUNT (0x2f) and FRAME_SIZE (0x11) of the section `.nv.info`."""
    section_at = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQ", cubin, section_at + index * size) for index in range(count)
    ]
    names = sections[names_index][4]
    found: dict[str, int] = {}
    for name, _, _, _, offset, length in sections:
        if cubin[names + name :].split(b"\0", 1)[0] != b".nv.info":
            continue
        at, end = offset, offset + length
        while at + 4 <= end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form != 4:
                continue
            if attribute in (0x2F, 0x11):
                what = "registers" if attribute == 0x2F else "stack"
                found[what] = struct.unpack_from("<II", cubin, at)[1]
            at += value
    return found


if __name__ == "__main__":
    write()
