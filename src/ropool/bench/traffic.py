"""The fewest bytes that an op must move, and so the time below which no kernel can go."""

from __future__ import annotations

from ropool.bench.workload import Workload

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
INDEX_BYTES = 8
"""Positions and slots are int64."""
SCALE_BYTES = 4
TABLE_BYTES = 4
"""The cos/sin cache is float32."""
DS_MLA_ROW = 656


def min_bytes(workload: Workload) -> int:
    """Bytes that `workload` must read and write when each is moved once.

    With `e` bytes an element of the model, `p` of the pool, for each of the `T` tokens:

        queries          Hq R e   read,  Hq R e written, or Hq D e read, Hq D written as fp8
        keys             Hk D e   read,  Hk D p to the pool (`rope_`: Hk R e read, Hk R e written)
        values           Hk D e   read,  Hk D p to the pool
        MLA row          (L + R) e read, (L + R) p to the pool, or 656 bytes
        cos/sin row      R 4      read                      (ops that rotate)
        position, slot   8 each   read                      (where the op has them)

    and once a call 4 bytes for each fp8 scale, and two rows of `D e` of norm weights. With a norm,
    and with an fp8 query, whole heads are read and written. Each token has a position of its own,
    so each reads its own row of the table.
    """
    w = workload
    element = BYTES[w.dtype]
    token = 0
    call = 2 * w.head_dim * element * w.norm + SCALE_BYTES * bool(w.q_dtype)
    if w.rotary_dim:
        width = w.head_dim if w.norm or w.q_dtype else w.rotary_dim
        written = BYTES[w.q_dtype] if w.q_dtype else element
        token += w.heads_q * width * (element + written)
        token += w.rotary_dim * TABLE_BYTES + INDEX_BYTES
    if w.op == "rope_":
        return w.tokens * (token + 2 * w.heads_kv * w.rotary_dim * element)
    token += INDEX_BYTES
    if w.mla:
        width = w.latent_dim + w.head_dim
        row = DS_MLA_ROW if w.kv_dtype == "fp8_ds_mla" else width * BYTES[w.kv_dtype]
        return call + w.tokens * (token + width * element + row) + SCALE_BYTES * w.fp8
    token += 2 * w.heads_kv * w.head_dim * (element + BYTES[w.kv_dtype])
    return call + w.tokens * token + 2 * SCALE_BYTES * w.fp8
