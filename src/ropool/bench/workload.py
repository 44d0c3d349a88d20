"""What is measured: one op on one shape. The product of the options that were asked for, less the
combinations that mean nothing, gives the workloads of a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ropool.dispatch import OPS
from ropool.errors import RopoolError

DTYPES = ("bfloat16", "float16", "float32")
KV_DTYPES = {"auto": "", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
MLA_KV_DTYPES = KV_DTYPES | {"fp8_ds_mla": "fp8_ds_mla"}
"""Option -> how the pool stores a row; empty: in the model dtype."""
NORMS = {"off": False, "on": True}
FP8 = ("float8_e4m3fn", "float8_e5m2")

DEFAULT_HEADS = ("32x8x128", "9x3x64", "128x512+64", "16x512+64")
DEFAULT_DTYPES = ("bfloat16", "float32")
DEFAULT_TOKENS = (1, 16, 256, 4096)

_KV_FORM = re.compile(r"(\d+)x(\d+)x(\d+)")
_MLA_FORM = re.compile(r"(\d+)x(\d+)\+(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One op on one shape. What an op does not have is 0 or empty: queries and rotation in the
    ops that only store, the pool in `rope_`."""

    op: str
    heads_q: int
    heads_kv: int
    head_dim: int
    """`D`; for the MLA ops the width of the rope part."""
    latent_dim: int = 0
    """`L` of the MLA ops."""
    rotary_dim: int
    dtype: str
    kv_dtype: str
    """dtype of the pool, or `fp8_ds_mla`."""
    tokens: int
    norm: bool = False
    """Query and key heads get an RMSNorm first (`rope_store_kv_`)."""
    q_dtype: str = ""
    """fp8 dtype of the tensor that the rotated query goes to; empty: rotated in place."""

    @property
    def mla(self) -> bool:
        return self.latent_dim > 0

    @property
    def interleaved(self) -> bool:
        """MLA models rotate the pairs `(2i, 2i+1)`, the others `(i, i + R/2)`."""
        return self.mla

    @property
    def heads(self) -> str:
        """The form that `--heads` takes; a store has no queries and shows `-` for them."""
        queries = self.heads_q or "-"
        if self.mla:
            return f"{queries}x{self.latent_dim}+{self.head_dim}"
        return f"{queries}x{self.heads_kv}x{self.head_dim}"

    @property
    def fp8(self) -> bool:
        """The pool's rows are fp8 with a scale given by the caller."""
        return self.kv_dtype in FP8

    def describe(self) -> str:
        return f"{self.op} {self.heads} {self.variant} T={self.tokens}"

    @property
    def variant(self) -> str:
        """The dtypes, and the norm if there is one."""
        pool = f" pool {self.kv_dtype}" if self.kv_dtype not in ("", self.dtype) else ""
        query = f" query {self.q_dtype}" if self.q_dtype else ""
        return f"{self.dtype}{pool}{query}{' norm' if self.norm else ''}"


def workloads(
    ops: Sequence[str] = (),
    heads: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    kv_dtypes: Sequence[str] = (),
    tokens: Sequence[int] = (),
    q_dtypes: Sequence[str] = (),
    norms: Sequence[str] = (),
) -> list[Workload]:
    """Every combination that has a meaning; an empty list stands for the default.

    Raises `RopoolError` for a value that is unknown, and for an op, heads, dtype of pool or query,
    or norm that was asked for and takes part in no combination.
    """
    known("op", ops, OPS)
    known("dtype", dtypes, DTYPES)
    known("KV dtype", kv_dtypes, tuple(MLA_KV_DTYPES))
    known("query dtype", q_dtypes, tuple(KV_DTYPES))
    known("norm", norms, tuple(NORMS))
    for count in tokens:
        if count < 1:
            raise RopoolError(f"bench: tokens is {count}; at least 1 is needed")
    shapes = {form: parse_heads(form) for form in heads or DEFAULT_HEADS}
    used: set[str] = set()
    found: dict[Workload, None] = {}
    for op, form, dtype, kv_dtype, q_dtype, norm, count in itertools.product(
        ops or OPS,
        shapes,
        dtypes or DEFAULT_DTYPES,
        kv_dtypes or ("auto",),
        q_dtypes or ("auto",),
        norms or ("off",),
        tokens or DEFAULT_TOKENS,
    ):
        workload = combine(op, shapes[form], dtype, kv_dtype, count)
        if workload is None or (NORMS[norm] and op != "rope_store_kv_"):
            continue
        if KV_DTYPES[q_dtype] and not op.startswith("rope_store_"):
            continue
        used.update((op, form, kv_dtype, q_dtype, norm))
        found[replace(workload, q_dtype=KV_DTYPES[q_dtype], norm=NORMS[norm])] = None
    for value in (*ops, *heads, *kv_dtypes, *q_dtypes, *norms):
        if value not in used:
            raise RopoolError(
                f"bench: {value} goes with nothing else that was asked for: heads HqxHkxD are for "
                "rope_, rope_store_kv_ and store_kv_, heads HqxL+R and fp8_ds_mla for store_mla_ "
                "and rope_store_mla_, an fp8 query for ops that rotate and store, the norm for "
                "rope_store_kv_"
            )
    return list(found)


def parse_heads(form: str, command: str = "bench") -> Workload:
    """The shape in `HqxHkxD` (`32x8x128`) or, for MLA, `HqxL+R` (`128x512+64`).

    Raises `RopoolError` in the name of `command`.
    """
    shape = Workload(
        op="", heads_q=0, heads_kv=1, head_dim=0, rotary_dim=0, dtype="", kv_dtype="", tokens=0
    )
    if match := _KV_FORM.fullmatch(form):
        heads_q, heads_kv, dim = map(int, match.groups())
        shape = replace(shape, heads_q=heads_q, heads_kv=heads_kv, head_dim=dim, rotary_dim=dim)
        if heads_kv and heads_q % heads_kv == 0 and heads_q and dim and dim % 2 == 0:
            return shape
    elif match := _MLA_FORM.fullmatch(form):
        heads_q, latent, dim = map(int, match.groups())
        shape = replace(shape, heads_q=heads_q, latent_dim=latent, head_dim=dim, rotary_dim=dim)
        if heads_q and latent and dim and dim % 2 == 0:
            return shape
    raise RopoolError(
        f"{command}: heads are {form!r}; expected HqxHkxD with Hq a multiple of Hk, as 32x8x128, "
        "or HqxL+R for MLA, as 128x512+64; D and R even"
    )


def combine(op: str, shape: Workload, dtype: str, kv_dtype: str, tokens: int) -> Workload | None:
    """The workload of `op` on `shape`, or `None` when the two do not go together."""
    if shape.mla != ("mla" in op):
        return None
    pools = MLA_KV_DTYPES if shape.mla else KV_DTYPES
    if kv_dtype not in pools:
        return None
    pool = pools[kv_dtype] or dtype
    if op == "rope_":
        pool = ""
    if not op.startswith("rope"):
        shape = replace(shape, heads_q=0, rotary_dim=0)
    return replace(shape, op=op, dtype=dtype, kv_dtype=pool, tokens=tokens)


def known(what: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise `RopoolError` for the first of `values` that is not allowed."""
    for value in values:
        if value not in allowed:
            raise RopoolError(f"bench: {what} {value!r} is unknown; known: {', '.join(allowed)}")
