"""How MLA rows were written in 2025: a Triton program for every 128 elements of every row."""

from __future__ import annotations

from typing import Any

from ropool.bench.inputs import Inputs
from ropool.bench.peers.package import Package, same_dtype_pool
from ropool.bench.provider import Call
from ropool.bench.workload import Workload

BLOCK = 128


def kernel() -> Any:
    """The kernel; Triton is imported here."""
    from ropool.bench.peers.baseline_kernel import write_part

    return write_part


def build(workload: Workload) -> Call:
    """Grid `(T, ceil((L + R) / 128))`."""
    write_part = kernel()
    latent, rope = workload.latent_dim, workload.head_dim
    grid = (workload.tokens, -(-(latent + rope) // BLOCK))

    def store(x: Inputs) -> None:
        pool = x.k_slots
        write_part[grid](
            pool, x.v, x.k, x.slots, pool.stride(0), x.v.stride(0), x.k.stride(0),
            LATENT=latent, ROPE=rope, BLOCK=BLOCK,
        )  # fmt: skip

    return store


def why_not(w: Workload) -> str | None:
    if w.op != "store_mla_" or not same_dtype_pool(w):
        return "writes MLA rows of the model's dtype only"
    if w.latent_dim % BLOCK:
        return f"needs a latent width that {BLOCK} divides"
    return None


PROVIDERS = (Package("triton", ("triton",)).provider("triton.2025", build, why_not=why_not),)
