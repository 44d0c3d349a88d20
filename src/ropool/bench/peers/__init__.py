"""Who does the same work elsewhere, by package. None is imported before a call of it is
built, and none is needed to import this."""

from __future__ import annotations

from ropool.bench.peers import (
    baseline,
    flashinfer,
    flashinfer_generated,
    plain_copy,
    sglang,
    vllm,
)

PEERS = (
    *plain_copy.PROVIDERS,
    *baseline.PROVIDERS,
    *sglang.PROVIDERS,
    *flashinfer.PROVIDERS,
    *flashinfer_generated.PROVIDERS,
    *vllm.PROVIDERS,
)
