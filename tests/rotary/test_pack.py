"""Tables that keep cosines and sines apart, at half and at full width, against the rotation of the
families of transformers that keep them so."""

from __future__ import annotations

import pytest
import torch
import transformers

import ropool
from ropool.rotary import pack_cos_sin
from rotary.hf_oracle import modeling

ROWS, R = 40, 24


def full_width(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`cos` and `sin` `[ROWS, R]` of a family: Llama repeats halves, Cohere neighbours."""
    prefix = family.capitalize()
    config = getattr(transformers, f"{prefix}Config")(hidden_size=4 * R, num_attention_heads=4)
    module = getattr(modeling(family), f"{prefix}RotaryEmbedding")(config)
    cos, sin = module(torch.empty(1), torch.arange(ROWS)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize(("family", "interleaved"), [("llama", False), ("cohere", True)])
def test_full_width_of_a_family(family: str, interleaved: bool) -> None:
    cos, sin = full_width(family)
    table = pack_cos_sin(cos, sin, R, interleaved=interleaved)
    assert table.shape == (ROWS, R)
    q, k = torch.randn(2, ROWS, 3, R, generator=torch.Generator().manual_seed(0))
    rotate = modeling(family).apply_rotary_pos_emb
    want = rotate(q, k, cos[None], sin[None], unsqueeze_dim=2)
    ropool.rope_(q, k, table, torch.arange(ROWS), interleaved=interleaved, backend="reference")
    torch.testing.assert_close((q, k), (want[0][0], want[1][0]), rtol=1e-5, atol=1e-5)


def test_half_width_is_put_side_by_side() -> None:
    cos, sin = torch.rand(2, ROWS, R // 2, dtype=torch.bfloat16)
    assert torch.equal(pack_cos_sin(cos, sin, R), torch.cat((cos, sin), dim=1))


def test_refusals() -> None:
    cos, sin = full_width("llama")
    with pytest.raises(ValueError, match=r"cos has different values .* \(interleaved is True\)"):
        pack_cos_sin(cos, sin, R, interleaved=True)
    with pytest.raises(ValueError, match="sin has different values"):
        pack_cos_sin(cos, sin + torch.arange(R), R)
    with pytest.raises(ValueError, match="cos has 24 columns and rotary_dim is 32"):
        pack_cos_sin(cos, sin, 32)
    with pytest.raises(ValueError, match=r"cos is torch.float32 \[40, 24\], sin is torch.float16"):
        pack_cos_sin(cos, sin.half(), R)
