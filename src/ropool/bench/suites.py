"""What the published figures of a kind of device measure: shapes, dtypes and tokens, and who takes
part where."""

from __future__ import annotations

from collections.abc import Sequence

from ropool.bench.provider import Provider
from ropool.bench.workload import Workload, workloads

TOKENS = (1, 8, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768)
MLA_TOKENS = (*TOKENS, 65536)
HEADS = ("32x8x128", "64x8x128", "8x1x128", "64x8x64", "40x8x128", "16x16x128", "9x3x64")
FEW_TOKENS = (1, 32, 512, 4096, 32768)
COMPILED_TOKENS = (1, 512, 8192)
PYTORCH_HEADS = ("32x8x128", "-x8x128", "128x512+64", "-x512+64")


def gpu() -> list[Workload]:
    """All ops: bfloat16 at every head shape; at some of them fp8 pools, with and without an fp8
    query, QK-norm, and the 656-byte row."""
    model = ["bfloat16"]
    fp8 = ["fp8_e4m3"]
    rope_store, mla = ["rope_store_kv_"], ["128x512+64"]
    parts = (
        workloads(rope_store, HEADS, model, [], TOKENS),
        workloads(rope_store, ["32x8x128"], model, fp8, TOKENS, fp8),
        workloads(rope_store, ["32x8x128"], model, fp8, TOKENS),
        workloads(rope_store, ["64x8x128", "8x1x128"], model, fp8, FEW_TOKENS, fp8),
        workloads(rope_store, ["32x8x128", "64x8x128"], model, [], TOKENS, [], ["on"]),
        workloads(["rope_"], HEADS, model, [], TOKENS),
        workloads(["store_kv_"], HEADS, model, [], TOKENS),
        workloads(["store_mla_"], mla, model, [], MLA_TOKENS),
        workloads(["store_mla_"], mla, model, ["fp8_ds_mla"], MLA_TOKENS),
        workloads(["rope_store_mla_"], mla, model, [], MLA_TOKENS),
        workloads(["rope_store_mla_"], mla, model, fp8, MLA_TOKENS, fp8),
        workloads(["rope_store_mla_"], mla, model, ["fp8_ds_mla"], FEW_TOKENS),
    )
    return list(dict.fromkeys(workload for part in parts for workload in part))


def takes_part(workload: Workload, provider: Provider) -> bool:
    """Who covers the workload. Plain PyTorch takes part at one head shape of each op; compiled, for
    a few numbers of tokens, since it compiles for each anew. Our kernels for other devices do not.
    """
    if provider.why_not(workload) is not None:
        return False
    if provider.name.startswith("torch."):
        few = provider.name != "torch.compiled" or workload.tokens in COMPILED_TOKENS
        return few and workload.heads in PYTORCH_HEADS
    return provider.name not in ("ropool.reference", "ropool.cpu")


SUITES = {"gpu": gpu}


def named(name: str) -> Sequence[Workload]:
    """The workloads of a suite."""
    return SUITES[name]()
