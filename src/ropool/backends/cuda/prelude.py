"""The head of a specialised kernel's source: its constants, its formats and its parameters."""

from __future__ import annotations

from ropool.backends.cuda.grid import Grid
from ropool.backends.cuda.shape import LOADS, Shape
from ropool.backends.cuda.specialise import POINTERS, SCALARS, Call

_INTEGERS = {
    **dict.fromkeys(("HQ", "HK", "HV", "MERGED", "JOINED", "STORE", "WRITE_K", "TILES"), 0),
    **dict.fromkeys(("Q_OUT", "Q_NORM", "K_NORM", "Q_SCALE", "K_SCALE", "V_SCALE"), 0),
    **dict.fromkeys(("HAS_OFFSETS", "HAS_PADDING", "HAS_WINDOW", "INTERLEAVED"), 0),
    **dict.fromkeys(("MROPE", "SECTION_T", "SECTION_H", "SECTION_W"), 0),
    **dict.fromkeys(("K_GROUP", "V_GROUP", "K_POOL_OFFSET", "V_POOL_OFFSET"), 0),
    **dict.fromkeys(("D", "DV", "VQ", "VK", "VV", "TABLE_WIDTH", "Q_NORM_WIDTH"), 1),
    **dict.fromkeys(("K_NORM_WIDTH", "Q_OUT_ALIGN", "K_POOL_ALIGN", "V_POOL_ALIGN"), 1),
    **dict.fromkeys(("PAGE", "K_ROW_GROUP", "V_ROW_GROUP"), 1),
    **{f"{kind}_{what}": 1 for kind in "QKV" for what in ("UNITS", "TEAM", "LANES")},
    **dict.fromkeys(("UQ", "UK", "UV", "GROUP"), 1),
    **dict.fromkeys(("K_BLOCKS", "V_BLOCKS", "Q_BLOCKS"), 0),
    "R": 0,
}
_FORMATS = {
    **dict.fromkeys(("Table", "KPool", "VPool", "QOut", "QNorm", "KNorm"), "F32"),
    **dict.fromkeys(("PositionInt", "SlotInt", "OffsetInt", "WindowInt"), "i64"),
}


def switches(shape: Shape) -> str:
    """What the preprocessor has to know."""
    values = {
        "PDL": int(shape.dependent),
        "AHEAD": int(shape.ahead),
        "LOADS": LOADS.index(shape.loads),
    }
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def prelude(call: Call, shape: Shape, grid: Grid) -> str:
    """The constants, formats and parameters, which the kernels' own text follows."""
    integers = _INTEGERS | call.integers
    integers |= {"D": call.key.head_dim, "R": call.key.rotary_dim}
    integers |= {"THREADS": shape.threads, **grid.constants}
    integers |= {"EARLY": int(shape.early), "KEEP_TABLE": int(not shape.early)}
    integers["JOINT"] = int(shape.joint)
    lines = [f"constexpr int {name} = {value};" for name, value in sorted(integers.items())]
    formats = _FORMATS | call.formats
    lines += [f"using {name} = {value};" for name, value in sorted(formats.items())]
    present = [name for name, _ in call.pointers]
    lines += ["struct Params {", *(f"  char* {name};" for name in present)]
    lines += [f"  i64 {name};" for name in call.scalars]
    lines += [f"  static constexpr char* {n} = nullptr;" for n in POINTERS if n not in present]
    lines += [f"  static constexpr i64 {n} = 0;" for n in SCALARS if n not in call.scalars]
    lines.append("};\n")
    return "\n".join(lines)
