"""`set_mla_kv_buffer` is `store_mla_`, and `can_use_set_mla_kv_buffer` says what is in the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ropool
from ropool.backends.cuda.forms import why_not_bulk
from ropool.ops._call import described

BF16 = torch.bfloat16


def call(latent: int = 512, rope: int = 64, slots: int = 40) -> tuple[Tensor, ...]:
    pool = torch.zeros(slots, latent + rope, dtype=BF16)
    loc = torch.tensor([7, -1, 0, slots - 1])
    return pool, loc, torch.randn(4, latent, dtype=BF16), torch.randn(4, rope, dtype=BF16)


@pytest.mark.parametrize("inner", [False, True])
def test_it_writes_the_rows(inner: bool) -> None:
    pool, loc, nope, rope = call()
    want = pool.clone()
    for token, slot in enumerate(loc.tolist()):
        if slot >= 0:
            want[slot] = torch.cat((nope[token], rope[token]))
    given = (pool, loc, nope, rope)
    if inner:
        given = (pool[:, None], loc, nope[:, None], rope[:, None])
    ropool.set_mla_kv_buffer(*given)
    assert torch.equal(pool, want)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize(("place", "name"), [(2, "cache_k_nope"), (3, "cache_k_rope")])
def test_a_part_with_another_number_of_heads_than_one_is_refused(
    place: int, name: str, heads: int
) -> None:
    given = list(call())
    given[place] = given[place][:, None].repeat(1, heads, 1)
    message = rf"{name} has shape \[4, {heads}, \d+\], {heads} heads; allowed: \[T, W\] or"
    with pytest.raises(ValueError, match=f"ropool.set_mla_kv_buffer: {message}"):
        ropool.set_mla_kv_buffer(*given)
    assert not given[0].any()
    with pytest.raises(ValueError, match=f"ropool.can_use_set_mla_kv_buffer: {message}"):
        ropool.can_use_set_mla_kv_buffer(*given)


def test_there_is_no_bulk_copy_engine_on_a_cpu() -> None:
    for form in ("bulk", "registers", "triton"):
        answer = ropool.can_use_set_mla_kv_buffer(*call(), form=form)
        assert not answer
        assert answer.reason is not None and "not on cpu" in answer.reason
    with pytest.raises(ValueError, match=r"form is 'tma'; known: bulk, registers, triton"):
        ropool.can_use_set_mla_kv_buffer(*call(), form="tma")
    with pytest.raises(TypeError, match=r"ropool.store_mla_: pool must be a torch.Tensor"):
        ropool.can_use_set_mla_kv_buffer(None, *call()[1:])  # type: ignore[arg-type]


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """The same at an address that is `elements` further than a multiple of 16 bytes."""
    storage = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    start = -storage.data_ptr() // tensor.element_size() % 8 + elements
    return storage[start : start + tensor.numel()].view(tensor.shape)


def strided(tensor: Tensor, width: int) -> Tensor:
    return tensor.new_zeros(tensor.shape[0], width)[:, : tensor.shape[1]]


def changed(place: int, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    given = list(call())
    given[place] = change(given[place])
    return tuple(given)


@pytest.mark.parametrize(
    ("given", "arch", "reason"),
    [
        (call(), "sm_90", None),
        (call(), "sm_120", None),
        (call(), "sm_89", "sm_89: the bulk copy engine came with sm_90"),
        (call(latent=508), "sm_90", "a row of k_nope is no multiple of 16 bytes"),
        (call(rope=60), "sm_90", "a row of k_rope is no multiple of 16 bytes"),
        (changed(0, lambda t: shifted(t, 4)), "sm_90", "not every row of k_nope in the pool is"),
        (changed(0, lambda t: strided(t, 580)), "sm_90", "not every row of k_nope in the pool is"),
        (changed(2, lambda t: shifted(t, 2)), "sm_90", "not every row of k_nope is aligned to 16"),
        (changed(3, lambda t: strided(t, 66)), "sm_90", "not every row of k_rope is aligned to 16"),
        (changed(0, lambda t: t.to(torch.float8_e4m3fn)), "sm_90", "the pool's format is another"),
    ],
)
def test_what_is_in_the_way_of_the_bulk_form(
    given: tuple[Tensor, ...], arch: str, reason: str | None
) -> None:
    pool, loc, nope, rope = given
    asked = described("test", "store_mla_", (nope, rope, pool, loc), {})
    key, options = asked.key()
    found = why_not_bulk(key, asked.tensors, options, arch)
    assert found == reason or (reason is not None and found is not None and reason in found)
