"""Random kernel calls, and what they must leave, in float64 from the definition of a rotation."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from metal_kernels.harness import Call, Shape

DIMS = (
    *((64, 64), (64, 32), (128, 128), (128, 64), (96, 96), (80, 32), (256, 64), (192, 192)),
    *(
        (24, 20),
        (40, 12),
        (6, 6),
        (7, 2),
        (5, 4),
        (9, 6),
        (2, 2),
        (60, 36),
        (20, 8),
        (20, 20),
        (36, 16),
        (576, 64),
    ),
)
HEADS = ((9, 3), (1, 1), (4, 1), (5, 5), (14, 2), (32, 8), (3, 3))
POSITIONS = (0, 1, 2, 17, 4095, 131071, 1000003, 2**24 - 1)
PER_THREAD = (0, 1, 2, 3, 8)
"""Heads a thread; 0: what the host would choose."""
LAST = 300
"""Rows of the cos/sin tables."""

# One rounding to the storage type, and a few units of float32 in what is rounded.
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}


def _rows(rng: random.Random, heads: int, dim: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """`[T, heads, D]` values with strides of every kind that a model makes."""
    kind = rng.choice((0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 4))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if kind == 0:  # plain
        shape: tuple[int, ...] = (tokens, heads, dim)
        return torch.randn(shape, generator=generator).to(dtype)
    if kind == 1:  # part of a packed projection
        packed = torch.randn((tokens, heads + 3, dim), generator=generator).to(dtype)
        return packed[:, 2 : 2 + heads]
    if kind == 2:  # heads first
        x = torch.randn((heads, tokens, dim), generator=generator).to(dtype)
        return x.transpose(0, 1)
    if kind == 3:  # rows that begin anywhere
        x = torch.randn((tokens, heads, dim + 3), generator=generator).to(dtype)
        return x[..., 1 : 1 + dim]
    x = torch.randn((tokens, dim, heads), generator=generator).to(dtype)  # dims apart
    return x.transpose(1, 2)


def random_call(kernel: str, dtype: torch.dtype, rng: random.Random) -> Call:
    """A call whose outputs hold a pattern that no kernel writes."""
    head_dim, rotary_dim = rng.choice(DIMS)
    heads_q, heads_kv = rng.choice(HEADS)
    tokens, slots = rng.choice((1, 1, 2, 5, 8)), rng.choice((8, 9, 33))
    # From frequencies every position can be rotated by, from a table those that it holds.
    source = rng.randrange(3)
    near = [*range(0, LAST, 7), LAST - 1, -1, LAST, -(2**31), 2**31 - 1]
    positions = [rng.choice(near if source else POSITIONS) for _ in range(tokens)]
    targets: list[int] = rng.sample(range(slots), tokens)
    for at in range(tokens):
        if rng.random() < 0.3:
            targets[at] = rng.choice((-1, -(2**31), slots, slots + 5, 2**31 - 1))
    index = (torch.int32, torch.int64)
    slot_dtype = rng.choice(index)
    if slot_dtype == torch.int64 and rng.random() < 0.3:
        targets[0] = rng.choice((2**32 + 1, -(2**32) + 1))  # a slot in its lower half
    pool = (slots, heads_kv, head_dim)
    tensors = {
        "q": _rows(rng, heads_q, head_dim, tokens, dtype),
        "k": _rows(rng, heads_kv, head_dim, tokens, dtype),
        "v": _rows(rng, heads_kv, head_dim, tokens, dtype),
        "positions": torch.tensor(positions, dtype=rng.choice(index)),
        "slots": torch.tensor(targets, dtype=slot_dtype),
        "source": _source(source, rotary_dim, dtype),
        "q_out": torch.full((tokens, heads_q, head_dim), 77.0, dtype=dtype),
        "k_out": torch.full((tokens, heads_kv, head_dim), 77.0, dtype=dtype),
        "k_pool": torch.full(pool, 77.0, dtype=dtype),
        "v_pool": torch.full(pool, 77.0, dtype=dtype),
    }
    if rng.random() < 0.3:  # every other index
        for name in ("positions", "slots"):
            tensors[name] = torch.stack([tensors[name], tensors[name]], 1).flatten()[::2]
    shape = Shape(tokens, heads_q, heads_kv, head_dim, rotary_dim, rng.random() < 0.5)
    if kernel == "kv_to_pool":
        shape.heads_q, shape.rotary_dim, source = 0, 0, 3
    per_thread = rng.choice(PER_THREAD)
    factor = rng.choice((1.0, 1.0, 0.5, 1.1902380714238083))
    return Call(kernel, shape, tensors, slots, source, factor, per_thread=per_thread)


def _source(source: int, rotary_dim: int, dtype: torch.dtype) -> Tensor:
    exact = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    if source == 0:
        high = exact.float()
        return torch.stack([high, (exact - high).float()])
    angles = torch.outer(torch.arange(LAST, dtype=torch.float64), exact)
    table = torch.cat([angles.cos(), angles.sin()], 1)
    return table.to(dtype if source == 2 else torch.float32)


def check(call: Call, before: dict[str, Tensor]) -> None:
    """Every output element has its float64 value, and each was stored exactly once or not at
    all."""
    q_done = call.kernel in ("rope_q", "rope_pool_fused")
    k_done = call.kernel in ("rope_k_pool", "rope_pool_fused")
    shape, t = call.shape, call.tensors
    known = [_known(call, int(p)) for p in before["positions"]]
    if call.kernel == "kv_to_pool":
        known = [True] * shape.tokens
    written = {}
    for at, slot in enumerate(before["slots"].tolist()):
        if 0 <= slot < call.slots and known[at]:
            written[slot] = at
    k_exact = _rotated(call, before["k"], known) if k_done else before["k"].double()
    if q_done:
        _close(t["q_out"], _rotated(call, before["q"], known), before["q"])
    if k_done:
        _close(t["k_out"], k_exact, before["k"])
    _stored(call, "q_out", range(shape.tokens) if q_done else ())
    _stored(call, "k_out", range(shape.tokens) if k_done else ())
    k_stored = k_done or call.kernel == "kv_to_pool"
    v_stored = call.kernel in ("v_to_pool", "kv_to_pool", "rope_pool_fused")
    _stored(call, "k_pool", written if k_stored else ())
    _stored(call, "v_pool", written if v_stored else ())
    for slot, at in written.items():
        if k_done:
            assert torch.equal(t["k_pool"][slot], t["k_out"][at])
        elif k_stored:
            assert torch.equal(t["k_pool"][slot], before["k"][at])
        if v_stored:
            assert torch.equal(t["v_pool"][slot], before["v"][at])


def _known(call: Call, position: int) -> bool:
    return call.source == 0 or 0 <= position < LAST


def _rotated(call: Call, x: Tensor, known: list[bool]) -> Tensor:
    pairs = call.shape.rotary_dim // 2
    exact = x.double().clone()
    source = call.tensors["source"].double()
    for at, position in enumerate(call.tensors["positions"].tolist()):
        if not known[at]:
            continue
        if call.source == 0:
            angle = position * (source[0] + source[1])
            cosine, sine = angle.cos(), angle.sin()
        else:
            cosine, sine = source[position, :pairs], source[position, pairs:]
        cosine, sine = cosine * call.factor, sine * call.factor
        if call.shape.interleaved:
            first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        else:
            first, second = slice(0, pairs), slice(pairs, 2 * pairs)
        a, b = x[at, :, first].double(), x[at, :, second].double()
        exact[at, :, first] = a * cosine - b * sine
        exact[at, :, second] = b * cosine + a * sine
    return exact


def _close(got: Tensor, exact: Tensor, before: Tensor) -> None:
    dtype = got.dtype
    # A few units of float32 of the largest value of the head stand in for those of each pair.
    scale = before.double().abs().amax(-1, keepdim=True)
    allowed = ROUNDING[dtype] * exact.abs() + 1.5e-6 * scale + SMALLEST[dtype]
    assert ((got.double() - exact).abs() <= allowed).all(), (got.double() - exact).abs().max()


def _stored(call: Call, name: str, rows: object) -> None:
    tensor = call.tensors[name]
    expected = torch.zeros((tensor.shape[0], tensor[0].nbytes), dtype=torch.uint8)
    expected[list(rows)] = 1  # type: ignore[call-overload]
    counts = call.counts[name].view(tensor.shape[0], -1)
    assert torch.equal(counts, expected), f"{name}: stored {counts.unique().tolist()} times"
