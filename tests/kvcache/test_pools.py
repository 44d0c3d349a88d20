"""The pools have the shapes that the ops take, in every layout and row format, and `clear` clears
just its pages."""

from __future__ import annotations

import pytest
import torch

from ropool import KVLayout, store_kv_, store_mla_
from ropool.kvcache import MHAPool, MLAFormat, MLAPool
from ropool.layouts import plane_view

FP8 = torch.float8_e4m3fn


def rows(tensor: torch.Tensor, layout: KVLayout, part: str, slots: list[int]) -> torch.Tensor:
    """`[slots, Hk, D]` of a pool tensor, element by element by its address formula."""
    view = plane_view(layout, part, tensor.shape, tensor.stride())
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,))
    out = torch.empty(len(slots), view.heads, view.head_dim)
    for i, slot in enumerate(slots):
        page, row = divmod(slot, view.page_size)
        for head in range(view.heads):
            for dim in range(view.head_dim):
                out[i, head, dim] = flat[
                    page * view.page_stride
                    + head * view.head_stride
                    + row // view.row_group * view.row_group_stride
                    + row % view.row_group * view.row_stride
                    + dim // view.dim_group * view.dim_group_stride
                    + dim % view.dim_group * view.dim_stride
                ].float()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("layout", list(KVLayout))
def test_mha_pool_takes_what_the_op_stores(layout: KVLayout, dtype: torch.dtype) -> None:
    page_size = 1 if layout is KVLayout.SLOTS else 16
    pool = MHAPool(
        layers=2,
        pages=4,
        page_size=page_size,
        heads=3,
        head_dim=32,
        v_head_dim=16,
        dtype=dtype,
        layout=layout,
    )
    k, v = torch.randn(2, 3, 32).to(torch.bfloat16), torch.randn(2, 3, 16).to(torch.bfloat16)
    if dtype == torch.float32:
        k, v = k.float(), v.float()
    slots = [3, page_size + 1]
    store_kv_(k, v, pool.k(1), pool.v(1), torch.tensor(slots), layout=layout)
    torch.testing.assert_close(rows(pool.k(1), layout, "k", slots), k.to(dtype).float())
    torch.testing.assert_close(rows(pool.v(1), layout, "v", slots), v.to(dtype).float())
    assert not pool.k(0).float().any() and not pool.v(0).float().any()
    assert pool.nbytes == 2 * 4 * page_size * 3 * (32 + 16) * dtype.itemsize

    pool.clear([slots[0] // page_size])
    assert not rows(pool.k(1), layout, "k", slots[:1]).any()
    assert rows(pool.v(1), layout, "v", slots[1:]).any()


def test_scales_of_an_fp8_pool() -> None:
    def pool(**options: torch.Tensor) -> MHAPool:
        return MHAPool(layers=2, pages=1, page_size=4, heads=3, head_dim=8, dtype=FP8, **options)

    per_head = pool(
        k_scales=torch.tensor([[1.0, 2, 3], [4, 5, 6]]), v_scales=torch.tensor([7.0, 8])
    )
    k_scale, v_scale = per_head.scales(1)
    assert k_scale is not None and v_scale is not None
    assert k_scale.tolist() == [4, 5, 6] and v_scale.shape == () and v_scale.item() == 8
    assert pool().scales(0) == (None, None)
    with pytest.raises(
        ValueError, match=r"k_scales is torch.float32 \(3,\), must be float32 \[2\]"
    ):
        pool(k_scales=torch.ones(3))
    with pytest.raises(ValueError, match=r"v_scales given, but the pool's dtype is torch.float32"):
        MHAPool(
            layers=1,
            pages=1,
            page_size=1,
            heads=1,
            head_dim=8,
            dtype=torch.float32,
            v_scales=torch.ones(1),
        )


@pytest.mark.parametrize(
    "layout, page_size, head_dim, message",
    [
        (KVLayout.SLOTS, 16, 64, "pages of 1 token"),
        (KVLayout.X_PACKED, 16, 12, "head_dim=12"),
        (KVLayout.SHUFFLED, 12, 64, "page_size=12"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    layout: KVLayout, page_size: int, head_dim: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MHAPool(
            layers=1,
            pages=2,
            page_size=page_size,
            heads=1,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            layout=layout,
        )


@pytest.mark.parametrize(
    "row_format, dtype, width, stored",
    [
        (MLAFormat.MODEL, torch.bfloat16, 576, torch.bfloat16),
        (MLAFormat.FP8, FP8, 576, FP8),
        (MLAFormat.FP8_DS_MLA, torch.bfloat16, 656, torch.uint8),
    ],
)
def test_mla_pool_takes_what_the_op_stores(
    row_format: MLAFormat, dtype: torch.dtype, width: int, stored: torch.dtype
) -> None:
    scales = torch.tensor([1.0, 2.0]) if row_format is MLAFormat.FP8 else None
    pool = MLAPool(
        layers=2,
        pages=3,
        page_size=4,
        latent_dim=512,
        rope_dim=64,
        dtype=dtype,
        row_format=row_format,
        scales=scales,
    )
    assert pool.rows(1).shape == (3, 4, width) and pool.rows(1).dtype == stored
    assert pool.nbytes == 2 * 3 * 4 * width * stored.itemsize
    nope, rope = torch.randn(2, 512).bfloat16(), torch.randn(2, 64).bfloat16()
    store_mla_(nope, rope, pool.rows(1), torch.tensor([2, 9]), scale=pool.scale(1))
    written = pool.rows(1).view(12, width).float().any(-1)
    assert written.nonzero().flatten().tolist() == [2, 9]
    assert not pool.rows(0).float().any()
    if row_format is MLAFormat.FP8:
        expected = torch.cat([nope, rope], -1).float() / 2
        got = pool.rows(1).view(12, width)[[2, 9]].float()
        torch.testing.assert_close(got, expected.to(FP8).float())
    pool.clear([0])
    assert pool.rows(1).view(12, width).float().any(-1).nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"row_format": MLAFormat.FP8_DS_MLA, "latent_dim": 256}, "got 256 and 64"),
        ({"row_format": MLAFormat.FP8}, "does not go with dtype torch.bfloat16"),
        ({"dtype": FP8}, "row format model does not go with dtype torch.float8_e4m3fn"),
        ({"scales": torch.ones(1)}, "scales must be float32"),
    ],
)
def test_an_mla_pool_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    given = {"latent_dim": 512, "dtype": torch.bfloat16, **options}
    with pytest.raises(ValueError, match=message):
        MLAPool(layers=1, pages=1, page_size=1, rope_dim=64, **given)  # type: ignore[arg-type]
