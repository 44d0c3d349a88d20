"""What a call with a wrong argument raises, and that it raises before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ropool
from ops.backend import Backend
from ops.calls import FP8, Args, Case, arguments, check_args
from ops.memory import placed
from oracle.compare import storage_bytes, tensors_of
from ropool.dispatch import settings

CASES = {
    "rope_": Case(op="rope_", head_dim=16, rotary_dim=8),
    "rope_store_kv_": Case(op="rope_store_kv_", head_dim=16, rotary_dim=8),
    "store_kv_": Case(op="store_kv_", head_dim=16),
    "store_mla_": Case(op="store_mla_", head_dim=8, latent_dim=24),
    "rope_store_mla_": Case(op="rope_store_mla_", heads_q=2, head_dim=8, latent_dim=24),
    # The same ops with every option that has a tensor.
    "rope_store_kv_ fp8": Case(
        head_dim=16,
        rotary_dim=8,
        pool_dtype=FP8[0],
        k_scale="head",
        v_scale="head",
        q_out=FP8[0],
        q_scale="head",
        q_norm="float32",
        k_norm="float32",
        offset_dtype="int64",
        window="int64",
        write_k=True,
    ),
    "store_kv_ fp8": Case(op="store_kv_", head_dim=16, pool_dtype=FP8[1], k_scale="one"),
    "store_mla_ fp8": Case(
        op="store_mla_", head_dim=8, latent_dim=24, row_format="fp8", pool_dtype=FP8[0]
    ),
    "store_mla_ rows": Case(op="store_mla_", head_dim=64, row_format="fp8_ds_mla"),
    "rope_store_mla_ rows": Case(
        op="rope_store_mla_", heads_q=2, head_dim=64, row_format="fp8_ds_mla"
    ),
    "mrope": Case(head_dim=16, rotary_dim=8, mrope="sectioned"),
    "x_packed": Case(op="store_kv_", head_dim=16, layout="x_packed"),
    "shuffled": Case(op="store_kv_", head_dim=16, layout="shuffled", page_size=8),
    "slots": Case(op="store_kv_", head_dim=16, layout="slots", pages=9),
}

Change = Callable[[Args], Any]


@dataclass(frozen=True)
class Wrong:
    """Argument `name` of `case`, replaced by `change(arguments)`; the message must hold `says`."""

    case: str
    name: str
    change: Change
    says: str
    error: type[Exception] | tuple[type[Exception], ...] = ValueError

    def __str__(self) -> str:
        return f"{self.case}-{self.name}-{self.says}"


def swap_dims(name: str) -> Change:
    return lambda a: a[name].transpose(-1, -2)


def cut(name: str, dim: int = 0) -> Change:
    """One element less along `dim`."""
    return lambda a: a[name].narrow(dim, 0, a[name].shape[dim] - 1)


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda a: torch.zeros(a[name].shape, dtype=dtype)


def negated(name: str) -> Change:
    return lambda a: torch._neg_view(a[name])


def unsqueezed(name: str) -> Change:
    return lambda a: a[name].unsqueeze(0)


def repeated(name: str, dim: int) -> Change:
    """Stride 0 along `dim`."""
    return lambda a: a[name].narrow(dim, 0, 1).expand(a[name].shape)


def gapped(name: str) -> Change:
    """The same shape with every second element of the last dimension."""
    return lambda a: torch.stack([a[name], a[name]], dim=-1).flatten(-2)[..., ::2]


def on_meta(name: str) -> Change:
    return lambda a: a[name].to("meta")


def const(value: Any) -> Change:
    return lambda a: value


TENSORS = {
    "rope_": ["q", "k", "cos_sin_cache", "positions"],
    "store_kv_": ["k", "v", "k_pool", "v_pool", "slot_mapping"],
    "store_mla_": ["k_nope", "k_rope", "pool", "slot_mapping"],
    "rope_store_kv_ fp8": [
        *["q", "k", "v", "k_pool", "v_pool", "cos_sin_cache", "positions", "slot_mapping"],
        *["offsets", "q_norm_weight", "k_norm_weight", "q_out", "window_slot_map"],
    ],
    "rope_store_mla_": [
        *["q_rope", "k_nope", "k_rope", "pool", "cos_sin_cache", "positions", "slot_mapping"],
    ],
}
SCALES = {"rope_store_kv_ fp8": ["k_scale", "v_scale", "q_scale"]}
TOKENS = {
    "rope_": ["positions"],
    "store_kv_": ["v", "slot_mapping"],
    "store_mla_": ["k_rope", "slot_mapping"],
    "rope_store_kv_ fp8": ["k", "v", "positions", "slot_mapping", "offsets", "q_out"],
    "rope_store_mla_": ["k_nope", "k_rope", "positions", "slot_mapping"],
}
WRITTEN = {
    "rope_": ["q", "k"],
    "store_kv_": ["k_pool", "v_pool"],
    "store_mla_": ["pool"],
    "rope_store_kv_": ["q", "k_pool", "v_pool"],
    "rope_store_kv_ fp8": ["k", "q_out", "k_pool", "v_pool"],
    "rope_store_mla_": ["q_rope", "pool"],
    "x_packed": ["k_pool", "v_pool"],
    "shuffled": ["k_pool", "v_pool"],
    "slots": ["k_pool", "v_pool"],
}
EITHER = (ValueError, TypeError)

WRONG: list[Wrong] = []
for _case, _names in TENSORS.items():
    for _name in _names:
        WRONG += [
            Wrong(_case, _name, negated(_name), f"{_name} is a lazily negated view"),
            Wrong(_case, _name, unsqueezed(_name), _name),
            Wrong(_case, _name, cast(_name, torch.float64), _name, TypeError),
            Wrong(_case, _name, cast(_name, torch.bool), _name, TypeError),
            Wrong(_case, _name, on_meta(_name), "meta"),
            Wrong(_case, _name, gapped(_name), _name),
            Wrong(_case, _name, const([1, 2, 3]), _name, TypeError),
        ]
for _case, _names in SCALES.items():
    for _name in _names:
        WRONG += [
            Wrong(_case, _name, unsqueezed(_name), _name),
            Wrong(_case, _name, const(torch.ones(3)), _name),
            Wrong(_case, _name, const(torch.ones(0)), _name),
            Wrong(_case, _name, cast(_name, torch.float64), _name, TypeError),
            Wrong(_case, _name, cast(_name, torch.bfloat16), _name, TypeError),
            Wrong(_case, _name, on_meta(_name), "meta"),
            Wrong(_case, _name, const(0.5), _name, TypeError),
        ]
for _case, _names in TOKENS.items():
    for _name in _names:
        WRONG += [Wrong(_case, _name, cut(_name), _name)]
for _case, _names in WRITTEN.items():
    for _name in _names:
        WRONG += [
            Wrong(_case, _name, repeated(_name, 0), _name),
            Wrong(_case, _name, repeated(_name, 1), _name),
        ]

_KV = "rope_store_kv_"
_FP8 = "rope_store_kv_ fp8"
WRONG += [
    # Heads and dims.
    Wrong(_KV, "v", cut("v", 1), "v has 1 heads, k has 2"),
    Wrong(_KV, "k", cut("k", 2), "k has 15 dims a head, q has 16"),
    Wrong(_KV, "q", cut("q", 1), "heads"),
    Wrong("rope_", "q", cut("q", 1), "heads"),
    Wrong(_KV, "q", lambda a: a["q"][:, :0], "heads"),
    Wrong(_KV, "k_pool", cut("k_pool", 2), "k_pool has 1 heads, k has 2"),
    Wrong(_KV, "v_pool", cut("v_pool", 3), "v_pool"),
    Wrong(_KV, "v_pool", cut("v_pool", 1), "v_pool"),
    Wrong(_KV, "v_pool", cut("v_pool", 0), "v_pool"),
    Wrong(_KV, "q", cast("q", torch.float16), "float16", TypeError),
    Wrong(_KV, "k", cast("k", torch.float16), "k is float16", TypeError),
    Wrong(_KV, "v", cast("v", torch.float32), "v is float32", TypeError),
    Wrong(_KV, "k_pool", cast("k_pool", torch.float16), "k_pool is float16", TypeError),
    Wrong(_KV, "v_pool", cast("v_pool", torch.float8_e5m2), "v_pool", TypeError),
    Wrong(_KV, "k_pool", cast("k_pool", torch.uint8), "k_pool is uint8", TypeError),
    # Index dtypes.
    Wrong(_KV, "positions", cast("positions", torch.int16), "positions is int16", TypeError),
    Wrong(_KV, "positions", cast("positions", torch.float32), "positions is float32", TypeError),
    Wrong(
        _KV, "slot_mapping", cast("slot_mapping", torch.uint8), "slot_mapping is uint8", TypeError
    ),
    Wrong(_FP8, "offsets", cast("offsets", torch.int16), "offsets is int16", TypeError),
    Wrong(
        _FP8, "window_slot_map", cast("window_slot_map", torch.int16), "window_slot_map", TypeError
    ),
    # A mapping that is longer than T is a mistake as well.
    Wrong(
        _KV, "slot_mapping", const(torch.zeros(7, dtype=torch.int64)), "slot_mapping has 7 tokens"
    ),
    Wrong(
        "store_kv_", "slot_mapping", const(torch.zeros(0, dtype=torch.int64)), "slot_mapping has 0"
    ),
    # The table.
    Wrong(_KV, "cos_sin_cache", const(torch.zeros(9, 7)), "7"),
    Wrong(_KV, "cos_sin_cache", const(torch.zeros(9, 0)), "0"),
    Wrong(_KV, "cos_sin_cache", const(torch.zeros(9, 18)), "18"),
    Wrong(
        _KV,
        "cos_sin_cache",
        cast("cos_sin_cache", torch.float16),
        "cos_sin_cache is float16",
        TypeError,
    ),
    Wrong("rope_store_mla_", "cos_sin_cache", const(torch.zeros(9, 6)), "6"),
    # M-RoPE.
    Wrong("mrope", "mrope_section", const((2, 1, 2)), "mrope_section"),
    Wrong("mrope", "mrope_section", const((4, 4, 4)), "mrope_section"),
    Wrong("mrope", "mrope_section", const((2, 2)), "mrope_section"),
    Wrong("mrope", "mrope_section", const((5, -1, 0)), "mrope_section"),
    Wrong("mrope", "mrope_section", const(None), "positions"),
    Wrong("mrope", "positions", lambda a: a["positions"][:2], "positions"),
    Wrong("mrope", "positions", lambda a: a["positions"][0], "positions"),
    Wrong(_KV, "mrope_section", const((2, 1, 1)), "positions"),
    Wrong(_KV, "mrope_interleaved", const(True), "mrope"),
    # Norms.
    Wrong(_FP8, "q_norm_weight", const(torch.ones(15)), "q_norm_weight has 15 dims a head"),
    Wrong(_FP8, "k_norm_weight", const(torch.ones(1)), "k_norm_weight has 1 dims a head"),
    Wrong(_FP8, "k_norm_weight", cast("k_norm_weight", torch.float16), "k_norm_weight", TypeError),
    Wrong(_FP8, "norm_eps", const(-1e-6), "norm_eps"),
    Wrong(_FP8, "norm_eps", const(float("nan")), "norm_eps"),
    Wrong(_FP8, "norm_eps", const(10**400), "norm_eps"),
    Wrong(_FP8, "norm_eps", const("1e-6"), "norm_eps", EITHER),
    # Scales without fp8, and of the wrong number of heads.
    Wrong(_KV, "k_scale", const(torch.ones(1)), "k_scale"),
    Wrong(_KV, "v_scale", const(torch.ones(1)), "v_scale"),
    Wrong(_KV, "q_scale", const(torch.ones(1)), "q_scale"),
    Wrong("store_kv_", "k_scale", const(torch.ones(())), "k_scale"),
    Wrong("store_mla_", "scale", const(torch.ones(())), "scale"),
    Wrong(_FP8, "q_out", lambda a: torch.zeros_like(a["q"]), "q_scale"),
    Wrong(_FP8, "q_out", const(None), "q_scale"),
    Wrong(_FP8, "q_scale", const(torch.ones(2)), "q_scale"),
    Wrong(_FP8, "k_scale", const(torch.ones(4)), "k_scale"),
    Wrong("store_mla_ fp8", "scale", const(torch.ones(2)), "scale"),
    Wrong("store_mla_ rows", "scale", const(torch.ones(1)), "scale"),
    Wrong("rope_store_mla_ rows", "scale", const(torch.ones(())), "scale"),
    Wrong(_FP8, "q_out", cut("q_out", 1), "q_out has 3 heads, q has 4"),
    Wrong(_FP8, "q_out", cut("q_out", 2), "q_out"),
    Wrong(_FP8, "q_out", cast("q_out", torch.float16), "q_out is float16", TypeError),
    # Layouts.
    Wrong(_KV, "layout", const("NDH"), "NDH", EITHER),
    Wrong(_KV, "layout", const(3), "3", EITHER),
    Wrong("store_kv_", "layout", const("nope"), "NHD", EITHER),
    Wrong("store_kv_", "layout", const("slots"), "k_pool"),
    Wrong("store_kv_", "layout", const("x_packed"), "k_pool"),
    Wrong("slots", "layout", const("NHD"), "k_pool"),
    Wrong("x_packed", "layout", const("shuffled"), "v_pool"),
    Wrong("shuffled", "layout", const("x_packed"), "v_pool"),
    Wrong("x_packed", "k_pool", cut("k_pool", 2), "k_pool"),
    Wrong("x_packed", "v_pool", cut("v_pool", 3), "v_pool"),
    Wrong("shuffled", "v_pool", swap_dims("v_pool"), "v_pool"),
    Wrong("store_kv_", "padding_slot", const(1.5), "padding_slot", EITHER),
    Wrong("store_kv_", "padding_slot", const("0"), "padding_slot", EITHER),
    # MLA rows.
    Wrong("store_mla_", "pool", cut("pool", 2), "31"),
    Wrong("store_mla_", "k_nope", cast("k_nope", torch.float16), "float16", TypeError),
    Wrong("store_mla_", "k_rope", cast("k_rope", torch.float32), "k_rope is float32", TypeError),
    Wrong("store_mla_", "pool", cast("pool", torch.uint8), "656"),
    Wrong("store_mla_ rows", "pool", const(torch.zeros(4, 655, dtype=torch.uint8)), "656"),
    Wrong("store_mla_ rows", "k_rope", cut("k_rope", 1), "656"),
    Wrong("store_mla_ rows", "pool", lambda a: a["pool"].flatten(), "pool"),
    Wrong("rope_store_mla_", "q_rope", cut("q_rope", 2), "7"),
    Wrong("rope_store_mla_", "q_out", const(torch.zeros(6, 2, 7, dtype=torch.bfloat16)), "q_out"),
    # Options of a wrong type.
    Wrong(_KV, "layout", const(["NHD"]), "layout", EITHER),
    Wrong("mrope", "mrope_section", const(5), "mrope_section", EITHER),
    Wrong("mrope", "mrope_section", const(([2], 1, 1)), "mrope_section", EITHER),
    Wrong("mrope", "mrope_section", const(("a", "b", "c")), "mrope_section", EITHER),
    Wrong("mrope", "mrope_section", const((2.0, 1.0, 1.0)), "mrope_section", EITHER),
    Wrong(_KV, "interleaved", const(None), "interleaved", EITHER),
    Wrong(_KV, "interleaved", const("yes"), "interleaved", EITHER),
    Wrong(_KV, "write_k", const("no"), "write_k", EITHER),
    Wrong(_KV, "padding_slot", const(2**63), "padding_slot", EITHER),
    # Backends.
    Wrong(_KV, "backend", const("nvidia"), "nvidia"),
    Wrong(_KV, "backend", const(""), "backend"),
    Wrong("rope_", "backend", const(3), "backend", TypeError),
]


def assert_raises_and_writes_nothing(
    op: str, args: Args, error: type[Exception] | tuple[type[Exception], ...], says: str
) -> None:
    before = {n: storage_bytes(t).clone() for n, t in tensors_of(args).items() if not t.is_meta}
    with pytest.raises(error) as caught:
        getattr(ropool, op)(**args)
    message = str(caught.value)
    assert message.startswith(f"ropool.{op}: "), message
    assert says in message, message
    for name, old in before.items():
        assert torch.equal(old, storage_bytes(args[name])), f"{name} was written"


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_argument(wrong: Wrong) -> None:
    case = CASES[wrong.case]
    args = arguments(case)
    args[wrong.name] = wrong.change(args)
    assert_raises_and_writes_nothing(case.op, args, wrong.error, wrong.says)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_argument_after_a_right_call(wrong: Wrong) -> None:
    """A call that is known must not lend its kernel to one that looks alike."""
    case = CASES[wrong.case]
    args = arguments(case)
    getattr(ropool, case.op)(**placed(args, "cpu"))
    args[wrong.name] = wrong.change(args)
    assert_raises_and_writes_nothing(case.op, args, wrong.error, wrong.says)


@pytest.mark.parametrize("name", CASES)
def test_the_right_call_is_right(name: str, backend: Backend) -> None:
    case = CASES[name]
    check_args(case.op, arguments(case), backend)


def test_message_names_the_op_the_argument_and_both_sizes() -> None:
    args = arguments(replace(CASES["rope_store_kv_"], heads_q=8, heads_kv=8))
    args["v"] = args["v"][:, :4]
    with pytest.raises(ValueError, match=r"^ropool\.rope_store_kv_: v has 4 heads, k has 8$"):
        ropool.rope_store_kv_(**args)


@pytest.mark.parametrize(
    "op", ["rope_", "store_kv_", "rope_store_kv_", "store_mla_", "rope_store_mla_"]
)
def test_wrong_shapes_raise_without_tokens_too(op: str) -> None:
    args = arguments(replace(CASES[op], tokens=0))
    name = "k" if "k" in args else "k_rope"
    args[name] = args[name][..., :-1]
    with pytest.raises(ValueError, match=rf"^ropool\.{op}: "):
        getattr(ropool, op)(**args)


def test_fake_tensors_are_validated_alike() -> None:
    with FakeTensorMode() as mode:
        args: dict[str, Any] = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments(CASES["rope_store_kv_"]).items()
        }
        ropool.rope_store_kv_(**args)
        args["v"] = args["v"][:, :1]
        with pytest.raises(ValueError, match="v has 1 heads, k has 2"):
            ropool.rope_store_kv_(**args)


# --- an explicit backend never falls back ---------------------------------------------------------


def test_unknown_backend_names_the_known_ones() -> None:
    args = arguments(CASES["rope_"])
    with pytest.raises(ValueError, match="reference") as caught:
        ropool.rope_(**args, backend="cuda12")
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize("how", ["argument", "setting"])
def test_a_backend_that_cannot_serve_a_call_raises(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs or raises with its reason; the reference backend, which could, is not asked."""
    import ropool.backends.cpu as cpu_backend

    monkeypatch.setattr(cpu_backend, "supports", lambda *key: "the moon is in the wrong house")
    args = arguments(CASES["rope_store_kv_"])
    before = {name: storage_bytes(tensor).clone() for name, tensor in tensors_of(args).items()}
    override: dict[str, Any] = {"backend": "cpu"} if how == "setting" else {}
    with (
        settings.override(**override),
        pytest.raises(Exception, match=r"ropool\.rope_store_kv_") as caught,
    ):
        ropool.rope_store_kv_(**args, backend="cpu" if how == "argument" else None)
    if cpu_backend.available() is None:
        assert "the moon is in the wrong house" in str(caught.value)
    for name, old in before.items():
        assert torch.equal(old, storage_bytes(args[name]))


def test_a_backend_that_cannot_serve_a_call_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an explicit choice an uncovered call falls through to the next kernel."""
    import ropool.backends.cpu as cpu_backend

    monkeypatch.setattr(cpu_backend, "supports", lambda *key: "not today")
    with settings.override(backend=None):
        args = placed(arguments(CASES["rope_store_kv_"]), "cpu")
        old = args["k_pool"].view(torch.int16).clone()
        ropool.rope_store_kv_(**args)
        assert not torch.equal(old, args["k_pool"].view(torch.int16))
