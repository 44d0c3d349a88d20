"""What goes wrong with fp8: rounding, saturation, scales and the 656-byte row's tiles."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ops.backend import Backend
from ops.calls import FNUZ, FP8, Case, arguments, check_args, check_stored
from oracle.formats import decode

BASE = Case(op="rope_store_kv_")
MLA = Case(op="rope_store_mla_", heads_q=3, head_dim=64, row_format="fp8_ds_mla")


# --- fp8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", FP8 + FNUZ)
@pytest.mark.parametrize("scale", [None, 1.0, 0.37, 2.0**-20])
def test_every_half_value_in_fp8(
    source: torch.dtype, stored: str, scale: float | None, backend: Backend
) -> None:
    """All 65536 of them: subnormals, ties, values past the largest, infinities, NaN."""
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(source).view(128, 2, 256)
    pool = torch.zeros(8, 16, 2, 256, dtype=getattr(torch, stored))
    scales = None if scale is None else torch.tensor(scale)
    args = {
        "k": codes,
        "v": codes.flip(0).contiguous(),
        "k_pool": pool,
        "v_pool": pool.clone(),
        "slot_mapping": torch.arange(128),
        "k_scale": scales,
        "v_scale": scales,
    }
    check_stored("store_kv_", args, backend)


@pytest.mark.parametrize("stored", FP8 + FNUZ)
def test_float32_next_to_every_tie(stored: str, backend: Backend) -> None:
    """Between two neighbours: the last float32 before the middle, the middle, the first after."""
    dtype = getattr(torch, stored)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    values = np.unique(decode(codes)[np.isfinite(decode(codes))])
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    past = np.array(
        [464, 465, 479, 480, 512, 1e30, 61440, 65504, 3e38, 2**-10, 2**-17, 1e-40, 1e-45],
        dtype=np.float32,
    )
    exact = np.concatenate([middle, values.astype(np.float32), past, -past])
    both = np.concatenate(
        [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    )
    both = np.resize(both, (len(both) + 31) // 32 * 32)
    k = torch.from_numpy(both).view(-1, 1, 32)
    tokens = k.shape[0]
    pool = torch.zeros(tokens, 1, 32, dtype=dtype)
    args = {
        "k": k,
        "v": -k,
        "k_pool": pool,
        "v_pool": pool.clone(),
        "slot_mapping": torch.arange(tokens),
        "layout": "slots",
    }
    check_stored("store_kv_", args, backend)


@pytest.mark.parametrize("stored", FP8 + FNUZ)
def test_scales_divide_and_each_head_has_its_own(stored: str, backend: Backend) -> None:
    for k_scale, v_scale, q_scale in itertools.product([None, "one", "tensor", "head"], repeat=3):
        case = replace(
            BASE,
            pool_dtype=stored,
            k_scale=k_scale,
            v_scale=v_scale,
            q_out=stored,
            q_scale=q_scale,
            tokens=3,
            head_dim=16,
            heads_q=8,
            heads_kv=4,
            specials=True,
        )
        check_stored(case.op, arguments(case), backend)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("op", ["store_mla_", "rope_store_mla_"])
def test_mla_tiles_of_every_kind(op: str, dtype: str, backend: Backend) -> None:
    """Tiles of zeros, of NaN, tiny, infinite, and with the largest value in each corner."""
    case = replace(MLA, op=op, dtype=dtype, tokens=16, pages=4, page_size=5, pool_strides="odd")
    args = arguments(case)
    nope = args["k_nope"]
    tiles = nope.unflatten(1, (4, 128))
    tiles[0] = 0
    tiles[1] = -0.0
    tiles[2] = float("nan")
    tiles[3, :, 5] = float("inf")
    tiles[4, :, 127] = float("-inf")
    tiles[5, :, 0] = float("nan")
    tiles[6] = torch.finfo(nope.dtype).tiny
    tiles[7] = torch.finfo(nope.dtype).max
    tiles[8, :, 1:] = 0
    tiles[9, 0] = 0
    tiles[10] = torch.finfo(nope.dtype).smallest_normal / 4
    tiles[11, 2] *= 1000
    tiles[12, :, 127] = 300
    tiles[13, :, 0] = -300
    tiles[14, :, 64] = float("nan")
    tiles[14, :, 65] = float("inf")
    # The largest first, then NaN in the same lane of every vector, and last of all.
    tiles[15, :, 3] = 400
    tiles[15, :, 11::8] = float("nan")
    tiles[15, :, 127] = float("nan")
    check_args(op, args, backend)
