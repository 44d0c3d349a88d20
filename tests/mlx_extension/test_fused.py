"""`rope_pool_fused` and `store_pool`, evaluated on the CPU: values, laziness, memory, errors."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
ropool_metal = pytest.importorskip("ropool_metal")

from ropool_metal import rope_pool_fused, store_pool  # noqa: E402

from mlx_extension.device import use_device  # noqa: E402
from mlx_extension.oracle import bits, close, rotated  # noqa: E402

use_device()

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
DIMS = ((64, 64), (64, 32), (128, 96), (80, 80), (24, 20), (6, 6), (7, 2), (2, 2))
HEADS = ((9, 3), (1, 1), (4, 1), (8, 4))
LAST = 300


def inputs(
    rng: np.random.Generator, dtype: Any, tokens: int = 4, heads_q: int = 4, heads_kv: int = 2
) -> dict[str, Any]:
    """Contiguous arguments of a plain call with `D` 8 and 16 slots."""

    def normal(*shape: int) -> Any:
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    return {
        "q": normal(tokens, heads_q, 8),
        "k": normal(tokens, heads_kv, 8),
        "v": normal(tokens, heads_kv, 8),
        "positions": mx.arange(tokens),
        "slots": mx.arange(tokens),
        "k_pool": mx.zeros((16, heads_kv, 8), dtype),
        "v_pool": mx.zeros((16, heads_kv, 8), dtype),
    }


def _view(rng: np.random.Generator, tokens: int, heads: int, dim: int, dtype: Any) -> Any:
    """`[T, heads, D]` with strides of every kind that a model makes."""
    kind = rng.integers(5)

    def normal(*shape: int) -> Any:
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    if kind == 0:
        return normal(tokens, heads, dim)
    if kind == 1:
        return normal(tokens, heads + 3, dim)[:, 2 : 2 + heads]
    if kind == 2:
        return normal(heads, tokens, dim).transpose(1, 0, 2)
    if kind == 3:
        return normal(tokens, heads, dim + 3)[..., 1 : 1 + dim]
    return normal(tokens, dim, heads).transpose(0, 2, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_calls(dtype: str) -> None:
    rng = np.random.default_rng(1)
    kind = DTYPES[dtype]
    for _ in range(3400):
        head_dim, rotary_dim = DIMS[rng.integers(len(DIMS))]
        heads_q, heads_kv = HEADS[rng.integers(len(HEADS))]
        tokens = int(rng.choice([0, 1, 2, 5]))
        q = _view(rng, tokens, heads_q, head_dim, kind)
        k = _view(rng, tokens, heads_kv, head_dim, kind)
        v = _view(rng, tokens, heads_kv, head_dim, kind)
        slot_list = rng.permutation(12)[:tokens]
        for at in range(tokens):
            if rng.random() < 0.3:
                slot_list[at] = rng.choice([-1, 12, 99, -(2**31), 2**31 - 1])
        options: dict[str, Any] = {
            "interleaved": bool(rng.integers(2)),
            "factor": float(rng.choice([1.0, 1.25])),
        }
        exact = 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
        mode = rng.integers(3)
        near = [0, 1, 17, LAST - 1] if mode == 2 else [0, 1, 17, 4095, 131071]
        positions = rng.choice(near, tokens) if tokens else np.zeros(0)
        if mode == 0:
            options |= {"base": 10000.0, "rotary_dim": rotary_dim}
        elif mode == 1:
            exact = exact.astype(np.float32)
            options["inv_freq"] = mx.array(exact)
        else:
            angles = np.outer(np.arange(LAST), exact)
            table = np.concatenate([np.cos(angles), np.sin(angles)], 1)
            options["cos_sin"] = mx.array(table.astype(np.float32))
            if tokens and rng.random() < 0.3:
                positions[0] = rng.choice([-1, LAST])
        index = [mx.int32, mx.int64]
        paged = rng.random() < 0.5
        shape = (3, 4, heads_kv, head_dim) if paged else (12, heads_kv, head_dim)
        pools = [mx.full(shape, 7.0, kind) for _ in range(2)]
        slots = mx.array(slot_list.astype(np.int64)).astype(index[rng.integers(2)])
        position_array = mx.array(positions.astype(np.int64)).astype(index[rng.integers(2)])
        outputs = rope_pool_fused(q, k, v, position_array, slots, *pools, **options)
        assert [x.shape for x in outputs] == [q.shape, k.shape, shape, shape]
        known = [mode < 2 or 0 <= p < LAST for p in positions]
        for got, x in zip(outputs[:2], (q, k), strict=True):
            close(got, rotated(x, positions, exact, known=known, **_style(options)), x)
        expected = [np.full((12, heads_kv, head_dim), 7.0), np.full((12, heads_kv, head_dim), 7.0)]
        for at, slot in enumerate(slot_list):
            if 0 <= slot < 12 and known[at]:
                expected[0][slot] = bits(outputs[1])[at]
                expected[1][slot] = bits(v)[at]
        for got, want in zip(outputs[2:], expected, strict=True):
            assert np.array_equal(bits(got).reshape(want.shape), want)


def _style(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("interleaved", "factor")}


def test_store_pool() -> None:
    args = inputs(np.random.default_rng(0), mx.bfloat16)
    slots = mx.array([5, -1, 16, 2])
    k_pool, v_pool = store_pool(args["k"], args["v"], slots, args["k_pool"], args["v_pool"])
    for pool, rows in ((k_pool, args["k"]), (v_pool, args["v"])):
        expected = np.zeros((16, 2, 8), np.float32)
        expected[[5, 2]] = bits(rows)[[0, 3]]
        assert np.array_equal(bits(pool), expected)


def _address(array: Any) -> int:
    return int(np.array(array, copy=False).__array_interface__["data"][0])


def test_a_pool_that_nobody_shares_is_written_in_place() -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    k_pool, v_pool = args.pop("k_pool"), args.pop("v_pool")
    mx.eval(k_pool, v_pool)
    before = [_address(k_pool), _address(v_pool)]
    for _ in range(3):
        # The old arrays are let go of before the new ones are evaluated.
        _, _, k_pool, v_pool = rope_pool_fused(**args, k_pool=k_pool, v_pool=v_pool, base=1e4)
        mx.eval(k_pool, v_pool)
        assert [_address(k_pool), _address(v_pool)] == before


@pytest.mark.parametrize("how", ["array", "view", "same pool twice", "graph"])
def test_a_shared_pool_is_copied(how: str) -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    k_pool, v_pool = args.pop("k_pool") + 3.0, args.pop("v_pool") + 4.0
    mx.eval(k_pool, v_pool)
    if how == "same pool twice":
        *_, k_new, v_new = rope_pool_fused(**args, k_pool=k_pool, v_pool=k_pool, base=1e4)
        del v_pool
        mx.eval(k_new, v_new)
        assert (bits(v_new)[:4] == bits(args["v"])).all() and (bits(v_new)[4:] == 3.0).all()
        assert (bits(k_new)[4:] == 3.0).all() and _address(k_new) != _address(v_new)
        assert (bits(k_pool) == 3.0).all()
        return
    others: list[Any] = {
        "array": [k_pool, v_pool],
        "view": [k_pool[2:9], v_pool.reshape(-1)],
        "graph": [k_pool * 1, v_pool * 1],
    }[how]
    if how != "graph":
        mx.eval(others)
    outputs = rope_pool_fused(**args, k_pool=k_pool, v_pool=v_pool, base=1e4)
    del k_pool, v_pool
    mx.eval(outputs)
    assert (bits(others[0]) == 3.0).all() and (bits(others[1]) == 4.0).all()
    assert (bits(outputs[3])[:4] == bits(args["v"])).all() and (bits(outputs[3])[4:] == 4.0).all()


def test_nothing_is_evaluated() -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    poisoned = args["k"] / mx.array(0.0)
    mx.eval(list(args.values()))
    before = mx.get_active_memory()
    outputs = rope_pool_fused(**{**args, "k": poisoned}, base=1e4)
    store_pool(poisoned, args["v"], args["slots"], args["k_pool"], args["v_pool"])
    assert mx.get_active_memory() - before < 1000  # the frequencies, at most
    assert outputs[0].shape == (4, 4, 8)


OPTIONS: dict[str, dict[str, Any]] = {
    "interleaved": {"interleaved": True},
    "factor": {"factor": 2.0},
    "same": {},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_only_equals_are_merged(name: str) -> None:
    """Two calls of the same arrays, whose options differ, in one compiled function."""
    args = inputs(np.random.default_rng(0), mx.float32)
    table = mx.array(np.linspace(0.1, 1, 72, dtype=np.float32).reshape(9, 8))
    names = tuple(args)

    def twice(table: Any, *arrays: Any) -> Any:
        call = dict(zip(names, arrays, strict=True))
        first = rope_pool_fused(**call, cos_sin=table)
        second = rope_pool_fused(**call, cos_sin=table, **OPTIONS[name])
        # What a function returns is never merged, so something stands behind it.
        return mx.negative(first[0]), mx.negative(second[0])

    plain = [bits(x) for x in twice(table, *args.values())]
    compiled = [bits(x) for x in mx.compile(twice)(table, *args.values())]
    assert np.array_equal(plain[0], plain[1]) == (name == "same")
    assert all(np.array_equal(a, b) for a, b in zip(plain, compiled, strict=True))


@pytest.mark.parametrize("index", [mx.int32, mx.int64])
@pytest.mark.parametrize("table", [False, True])
def test_indices_with_a_stride(index: Any, table: bool) -> None:
    """Every other one of a longer array, the ones between being wrong."""
    args = inputs(np.random.default_rng(0), mx.float32)
    positions, slots = [5, 0, 9, 3], [7, 1, 12, 2]
    args["positions"] = mx.array([x for p in positions for x in (p, p + 1)], index)[::2]
    args["slots"] = mx.array([x for s in slots for x in (s, s + 1)], index)[::2]
    frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    options: dict[str, Any] = {"base": 1e4}
    if table:
        angles = np.outer(np.arange(LAST), frequencies)
        rows = np.concatenate([np.cos(angles), np.sin(angles)], 1)
        options = {"cos_sin": mx.array(rows.astype(np.float32))}
    mx.eval(list(args.values()))
    q, k, k_pool, v_pool = rope_pool_fused(**args, **options)
    stores = {n: args[n] for n in ("k", "v", "slots", "k_pool", "v_pool")}
    k_stored, v_stored = store_pool(**stores)
    for got, x in ((q, args["q"]), (k, args["k"])):
        close(got, rotated(x, positions, frequencies, known=[True] * 4), x)
    for pool, x in ((k_pool, k), (v_pool, args["v"]), (k_stored, args["k"]), (v_stored, args["v"])):
        expected = np.zeros((16, 2, 8), np.float32)
        expected[slots] = bits(x)
        assert np.array_equal(bits(pool), expected)


def test_indices_wider_than_32_bits() -> None:
    """Slots and positions whose lower half alone would be one that there is."""
    args = inputs(np.random.default_rng(0), mx.float32)
    args["slots"] = mx.array([3, 2**32 + 5, -(2**32) + 6, 9], mx.int64)
    stored, _ = store_pool(*(args[n] for n in ("k", "v", "slots", "k_pool", "v_pool")))
    assert bits(stored).any((1, 2)).nonzero()[0].tolist() == [3, 9]
    args["positions"] = mx.array([0, 1, 2, 2**32 + 3], mx.int64)
    table = mx.array(np.full((LAST, 8), 0.5, np.float32))
    q, _, k_pool, v_pool = rope_pool_fused(**args, cos_sin=table)
    assert np.array_equal(bits(q)[3], bits(args["q"])[3])
    assert not np.array_equal(bits(q)[2], bits(args["q"])[2])
    for pool in (k_pool, v_pool):
        assert bits(pool).any((1, 2)).nonzero()[0].tolist() == [3]


def test_threads() -> None:
    results: list[Any] = [None] * 8

    def work(number: int) -> None:
        stream = mx.new_stream(mx.default_device())
        with mx.stream(stream):
            args = inputs(np.random.default_rng(3), mx.float32, tokens=16)
            for _ in range(30):
                outputs = rope_pool_fused(**args, base=1e4)
                mx.eval(outputs)
            results[number] = [bits(x) for x in outputs]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found, results[0], strict=True))


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "dtype": (lambda a: {"q": a["q"].astype(mx.int32)}, "q is int32; allowed: float32"),
    "dtypes": (lambda a: {"v": a["v"].astype(mx.float16)}, "v is float16, the first argument is"),
    "rank": (lambda a: {"k": a["k"][0]}, r"k has shape \(2,8\); expected \[T, heads, D\]"),
    "tokens": (lambda a: {"q": a["q"][:3]}, "k has 4 tokens, q has 3"),
    "head dim": (lambda a: {"q": a["q"][..., :6]}, "k has head dim 8, q has 6"),
    "heads": (lambda a: {"q": a["q"][:, :3]}, "q has 3 heads; allowed: a multiple of the 2"),
    "v": (lambda a: {"v": a["v"][:, :1]}, "v has shape"),
    "positions": (lambda a: {"positions": mx.arange(3)}, r"positions has shape \(3\); expected \["),
    "index dtype": (lambda a: {"slots": mx.ones(4)}, "slots is float32; allowed: int32, int64"),
    "pool": (lambda a: {"k_pool": mx.zeros((16, 3, 8))}, r"k_pool has shape \(16,3,8\); expected"),
    "pools": (lambda a: {"v_pool": mx.zeros((17, 2, 8))}, r"v_pool has shape \(17,2,8\), k_pool"),
    "pool dtype": (lambda a: {"k_pool": a["k_pool"].astype(mx.float16)}, "k_pool is float16, k is"),
    "base": (lambda a: {"base": 1.0}, "base is 1; allowed: a finite number above 1"),
    "no base": (lambda a: {"base": None}, "0 of inv_freq, cos_sin and base were given"),
    "both": (lambda a: {"inv_freq": mx.ones(4)}, "2 of inv_freq, cos_sin and base were given"),
    "odd rotary": (lambda a: {"rotary_dim": 3}, "the rotary dim is 3; allowed: an even number"),
    "wide rotary": (lambda a: {"rotary_dim": 10}, "the rotary dim is 10; allowed: an even number"),
    "frequencies": (
        lambda a: {"base": None, "inv_freq": mx.ones((3, 4))},
        r"inv_freq has shape \(3,4\); expected \[R/2\]",
    ),
    "two widths": (
        lambda a: {"base": None, "inv_freq": mx.ones(2), "rotary_dim": 8},
        "rotary_dim is 8, the frequencies are those of 4",
    ),
    "table": (lambda a: {"base": None, "cos_sin": mx.ones(8)}, "cos_sin has shape"),
    "table dtype": (
        lambda a: {"base": None, "cos_sin": mx.ones((9, 8), mx.float16)},
        r"cos_sin is float16; allowed: float32, the dtype of q \(float32\)",
    ),
    "factor": (lambda a: {"factor": math.inf}, "factor is inf; allowed: a finite number"),
    "wide factor": (
        lambda a: {"factor": -1e300},
        r"factor is -1e\+300; allowed: a finite number of",
    ),
}


TYPES: dict[str, tuple[Any, str]] = {
    "q": (np.zeros((4, 4, 8), np.float32), "ndarray; allowed: array"),
    "slots": ([0, 1, 2, 3], "list; allowed: array"),
    "cos_sin": ("table", "str; allowed: array, None"),
    "base": ("1e4", "str; allowed: float, int, None"),
    "rotary_dim": (4.0, "float; allowed: int, None"),
    "interleaved": ("yes", "str; allowed: bool"),
    "stream": (3, "int; allowed: Stream, Device, DeviceType, None"),
}


@pytest.mark.parametrize("name", TYPES)
def test_mistaken_types(name: str) -> None:
    value, message = TYPES[name]
    args = {**inputs(np.random.default_rng(0), mx.float32), "base": 1e4, name: value}
    expected = f"^ropool_metal.rope_pool_fused: {name} is of type {message}$"
    with pytest.raises(TypeError, match=expected):
        rope_pool_fused(**args)
    if name == "slots":
        with pytest.raises(TypeError, match=r"^ropool_metal.store_pool: slots is of type list; a"):
            store_pool(*(args[n] for n in ("k", "v", "slots", "k_pool", "v_pool")))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    change, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as caught:
        rope_pool_fused(**{**args, "base": 1e4, **change(args)})
    assert str(caught.value).startswith("ropool_metal.rope_pool_fused: ")


def test_a_pool_that_is_no_block_of_memory() -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    args["k_pool"] = mx.zeros((2, 16, 8)).transpose(1, 0, 2)
    lazily = rope_pool_fused(**args, base=1e4)
    with pytest.raises(ValueError, match=r"^ropool_metal\.rope_pool_fused: k_pool must be row"):
        mx.eval(lazily)
    mx.eval(args["k_pool"])
    with pytest.raises(ValueError, match="k_pool must be row-contiguous"):
        rope_pool_fused(**args, base=1e4)


@pytest.mark.parametrize("name", ["k_pool", "v_pool"])
@pytest.mark.parametrize("rotates", [True, False])
def test_outputs_can_be_evaluated_again_after_an_error(name: str, rotates: bool) -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    args[name] = mx.zeros((2, 16, 8)).transpose(1, 0, 2)
    if rotates:
        outputs = rope_pool_fused(**args, base=1e4)
    else:
        outputs = store_pool(*(args[n] for n in ("k", "v", "slots", "k_pool", "v_pool")))
    for output in outputs * 2:
        with pytest.raises(ValueError, match=f"{name} must be row-contiguous"):
            mx.eval(output)


def test_transforms_are_refused() -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    q = args.pop("q")

    def rotate(q: Any) -> Any:
        return rope_pool_fused(q, **args, base=1e4)[0].sum()

    def store(k: Any) -> Any:
        return store_pool(k, *(args[n] for n in ("v", "slots", "k_pool", "v_pool")))[0].sum()

    for name, function, x in (("rope_pool_fused", rotate, q), ("store_pool", store, args["k"])):
        transforms = {
            "vjp": mx.grad(function),
            "jvp": lambda x, f=function: mx.jvp(f, [x], [x]),
            "vmap": lambda x, f=function: mx.vmap(f)(mx.stack([x, x])),
        }
        for transform, run in transforms.items():
            message = f"^ropool_metal.{name}: {transform} is not defined for it; it writes into a"
            with pytest.raises(ValueError, match=message):
                mx.eval(run(x))


def test_compiled_for_every_number_of_tokens() -> None:
    """A compiled function without shapes asks the primitives for those of their outputs."""
    rng = np.random.default_rng(2)
    names = ("k", "v", "slots", "k_pool", "v_pool")
    both = mx.compile(
        lambda *args: (
            *rope_pool_fused(*args, base=1e4),
            *store_pool(*(args[i] for i in (1, 2, 4, 5, 6))),
        ),
        shapeless=True,
    )
    for tokens in (4, 7, 1, 0):
        args = inputs(rng, mx.float32, tokens=tokens)
        expected = (*rope_pool_fused(**args, base=1e4), *store_pool(*(args[n] for n in names)))
        for got, want in zip(both(*args.values()), expected, strict=True):
            assert got.shape == want.shape and np.array_equal(bits(got), bits(want))


@pytest.mark.parametrize("shape", [(0, 2, 8), (0, 4, 2, 8), (3, 0, 2, 8)])
def test_pools_without_slots(shape: tuple[int, ...]) -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    args |= {"k_pool": mx.zeros(shape), "v_pool": mx.zeros(shape)}
    q, k, *pools = rope_pool_fused(**args, base=1e4)
    frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    for got, x in ((q, args["q"]), (k, args["k"])):
        close(got, rotated(x, range(4), frequencies, known=[True] * 4), x)
    pools += store_pool(*(args[n] for n in ("k", "v", "slots", "k_pool", "v_pool")))
    assert all(pool.shape == shape for pool in pools)
    mx.eval(pools)


def test_a_stream_of_ones_own() -> None:
    args = inputs(np.random.default_rng(0), mx.float32)
    expected = rope_pool_fused(**args, base=1e4)
    own = mx.new_stream(mx.default_device())
    for stream in (own, mx.default_device()):
        found = rope_pool_fused(**args, base=1e4, stream=stream)
        assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


def test_another_mlx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setattr(mx, "__version__", "0.33.0")
    with pytest.raises(ImportError, match=r"is built for mlx .*, installed is mlx 0\.33\.0: pip"):
        importlib.reload(ropool_metal)


def test_the_verification_for_macs(capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_extension import verify

    found = verify.rows()
    assert len(found) == 390
    for row in found[::13]:
        assert verify.verify(row) > 0
