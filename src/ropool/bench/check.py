"""Is a provider's result right? Every callable is compared with an evaluation in float64 before it
is timed, and the rows of the pool that it must not touch with what they were."""

from __future__ import annotations

import torch
from torch import Tensor

from ropool.bench.inputs import NORM_EPS, PAGE, SCALE, Inputs, copied
from ropool.bench.provider import Call, Provider
from ropool.bench.workload import Workload

# An element may be off by its relative part, plus the second part of the largest of its head.
TOLERANCE = {
    "float32": (1e-5, 1e-5),  # a few roundings of 2^-24
    "float16": (2e-3, 4e-3),  # torch rounds cos, sin, both products and the sum, 2^-11 each
    "bfloat16": (1e-2, 2e-2),  # the same with 2^-9
    "float8_e4m3fn": (0.125, 2e-2),  # one step of 2^-3: the value is rounded to bfloat16 before
    "float8_e5m2": (0.25, 2e-2),  # one step of 2^-2
}


def difference(workload: Workload, provider: Provider, call: Call, inputs: Inputs) -> str | None:
    """What is wrong with the outcome of `call` on a copy of `inputs`, or `None`. The pool is left
    as it was."""
    w = workload
    if provider.verify is not None:
        return provider.verify(call, inputs)
    mine = copied(inputs)
    kept = {name: bits(pool).clone() for name, pool in pools(mine)}
    for _, pool in pools(mine):
        as_rows(pool)[mine.slots] = 0xFF  # NaN in every format: what is not written shows
    returned = call(mine)
    got = outputs(w, mine, returned)
    want = expected(w, inputs, provider)
    for name, pool in pools(mine):
        rows, before = as_rows(pool), as_rows(kept[name])
        rows[mine.slots] = before[mine.slots]
        if provider.clears_pages:
            page = (mine.slots // PAGE)[:, None] * PAGE + torch.arange(PAGE, device=rows.device)
            cleared = page.flatten()[(rows[page.flatten()] == 0).all(dim=1)]
            rows[cleared] = before[cleared]
        if not torch.equal(bits(pool), kept[name]):
            return f"{name}: rows of other slots were written"
    for name in want:
        problem = off(got[name], want[name], *tolerance(w, name))
        if problem is not None:
            return f"{name}: {problem}"
    return None


def pools(x: Inputs) -> list[tuple[str, Tensor]]:
    """The pool's tensors by name."""
    named = (("k_pool", x.k_pool), ("v_pool", x.v_pool))
    return [(name, pool) for name, pool in named if pool.numel()]


def bits(pool: Tensor) -> Tensor:
    """The pool as bytes."""
    return pool.view(torch.uint8)


def as_rows(pool: Tensor) -> Tensor:
    """`[S, bytes]`: the pool's slots."""
    return bits(pool).flatten(0, 1).flatten(1)


def outputs(w: Workload, x: Inputs, returned: Tensor | None) -> dict[str, Tensor]:
    """What a call has produced, in float64."""
    found = {}
    if w.heads_q:
        in_place = x.q_out if w.q_dtype else x.q
        q = in_place if returned is None else returned
        q = q[0].transpose(0, 1) if q.dim() == 4 else q
        if w.q_dtype:
            q = q.view(getattr(torch, w.q_dtype)).float()
        found["q"] = q.double() * (SCALE if w.q_dtype else 1.0)
    found["k"] = x.k.double()
    if w.kv_dtype == "fp8_ds_mla":
        row = as_rows(x.k_pool)[x.slots]
        scales = row[:, 512:528].contiguous().view(torch.float32).double()
        latent = row[:, :512].contiguous().view(torch.float8_e4m3fn).float().double()
        found["latent"] = (latent.unflatten(1, (4, 128)) * scales[..., None]).flatten(1)
        found["rope"] = row[:, 528:].contiguous().view(torch.bfloat16).double()
        return found
    for name, pool in pools(x):
        rows = as_rows(pool)[x.slots].view(pool.dtype).float().double()
        rows = rows * (SCALE if w.fp8 else 1.0)
        if w.mla:
            found["latent"], found["rope"] = rows.split((w.latent_dim, w.head_dim), dim=-1)
        else:
            found[name] = rows.unflatten(1, (w.heads_kv, w.head_dim))
    return found


def expected(w: Workload, x: Inputs, provider: Provider) -> dict[str, Tensor]:
    """The definition of the op, in float64, with the provider's liberties."""
    q, k, v = x.q.double(), x.k.double(), x.v.double()
    rotated = k
    if w.norm:
        q, rotated = rms_norm(q, x.q_norm), rms_norm(k, x.k_norm)
    if w.rotary_dim:
        cos, sin = x.table[x.positions].double().chunk(2, dim=-1)
        style = (cos, sin, w.interleaved, provider.splits_pairs)
        q = rotate(q, *style)
        rotated = (
            rotate(rotated.unsqueeze(1), *style).squeeze(1) if w.mla else rotate(rotated, *style)
        )
    found = {}
    if not provider.writes_k or w.op == "rope_":
        found["k"] = rotated if w.op == "rope_" else k
    if w.heads_q:
        found["q"] = q
    if w.mla:
        found |= {"latent": v, "rope": rotated}
    elif w.op != "rope_":
        found |= {"k_pool": rotated, "v_pool": v}
    return found


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of each head, in float64."""
    mean = x.square().mean(dim=-1, keepdim=True)
    return x * (mean + NORM_EPS).rsqrt() * weight.double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, splits_pairs: bool) -> Tensor:
    """Rotate heads `[T, H, R]` by angles `[T, R/2]`."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    halves = (first * cos - second * sin, second * cos + first * sin)
    if interleaved and not splits_pairs:
        return torch.stack(halves, dim=-1).flatten(-2)
    return torch.cat(halves, dim=-1)


def tolerance(w: Workload, name: str) -> tuple[float, float]:
    """The tolerance of an output: that of the coarser of the dtypes it went through."""
    passed = [w.dtype]
    if name == "q" and w.q_dtype:
        passed.append(w.q_dtype)
    if name in ("k_pool", "v_pool", "latent", "rope"):
        if w.kv_dtype != "fp8_ds_mla":
            passed.append(w.kv_dtype)
        else:
            passed.append("float8_e4m3fn" if name == "latent" else "bfloat16")
    return max(TOLERANCE[dtype] for dtype in passed)


def off(got: Tensor, want: Tensor, relative: float, of_largest: float) -> str | None:
    """How far `got` is off where it is too far, or `None`. NaN is always too far."""
    allowed = relative * want.abs() + of_largest * want.abs().amax(dim=-1, keepdim=True)
    error = (got - want).abs()
    wrong = ~(error <= allowed)
    if not wrong.any():
        return None
    worst = (error - allowed).nan_to_num(nan=torch.inf).argmax()
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, such as "
        f"{got.flatten()[worst].item():.6g} instead of {want.flatten()[worst].item():.6g}"
    )
