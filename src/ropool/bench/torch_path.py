"""What a user would otherwise run: the rotation of `transformers` on `[1, H, T, D]` tensors, with
the cos and sin that it hands to each layer, then index assignment into the pool; eager or
compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ropool.bench.inputs import NORM_EPS, Inputs
from ropool.bench.workload import Workload

Path = Callable[..., Any]
"""Takes tensors only, so that compiled code has nothing else to guard."""


def version() -> str:
    """Of both packages."""
    try:
        return f"torch {torch.__version__}, transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        return f"torch {torch.__version__}"


def unavailable(device: torch.device) -> str | None:
    """Runs on every device."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    return None


def eager(workload: Workload) -> Callable[[Inputs], Tensor | None]:
    """The path as it stands."""
    return with_inputs(workload, path(workload))


def compiled(workload: Workload) -> Callable[[Inputs], Tensor | None]:
    """The path under `torch.compile` for exactly this shape. What was compiled before is dropped
    first, since PyTorch stops compiling a function that has met too many shapes."""
    torch._dynamo.reset()
    return with_inputs(workload, torch.compile(path(workload), dynamic=False))


def with_inputs(workload: Workload, function: Path) -> Callable[[Inputs], Tensor | None]:
    """Give `function` what it takes."""

    def rope(x: Inputs) -> Tensor | None:
        return function(x.q_heads_first, x.k_heads_first, x.cos, x.sin)

    def rope_store(x: Inputs) -> Tensor | None:
        return function(
            x.q_heads_first, x.k_heads_first, x.cos, x.sin,
            x.v, x.k_slots, x.v_slots, x.slots, x.scale, x.q_norm, x.k_norm,
        )  # fmt: skip

    def store(x: Inputs) -> Tensor | None:
        return function(x.k, x.v, x.k_slots, x.v_slots, x.slots, x.scale)

    if workload.op == "rope_":
        return rope
    return rope_store if workload.rotary_dim else store


def path(workload: Workload) -> Path:
    """The function that does the work of the workload's op. Its queries and keys are
    `[1, H, T, D]` when it rotates."""
    put = writer(workload)
    norm, query_dtype = workload.norm, getattr(torch, workload.q_dtype, None)
    if not workload.rotary_dim:
        return put
    rotate = rotation(workload)
    one_head = workload.mla

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        rotated_q, rotated_k = rotate(q, k, cos, sin)
        q.copy_(rotated_q)
        k.copy_(rotated_k)

    def rope_store(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
        v: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor, scale: Tensor | None,
        q_norm: Tensor, k_norm: Tensor,
    ) -> Tensor:  # fmt: skip
        if norm:
            q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)
        rotated_q, rotated_k = rotate(q, k, cos, sin)
        heads = rotated_k[0, 0] if one_head else rotated_k[0].transpose(0, 1)
        put(heads, v, k_slots, v_slots, slots, scale)
        return stored(rotated_q, query_dtype, scale)

    return rope if workload.op == "rope_" else rope_store


def rotation(workload: Workload) -> Callable[..., tuple[Tensor, Tensor]]:
    """`transformers`' rotation for the model family."""
    found: Any
    if workload.interleaved:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3

        found = modeling_deepseek_v3.apply_rotary_pos_emb_interleave
    else:
        from transformers.models.llama import modeling_llama

        found = modeling_llama.apply_rotary_pos_emb
    return found


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The norm of `transformers`' Qwen3 on each head: float32 inside, rounded before the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
    return weight * wide.to(x.dtype)


def writer(workload: Workload) -> Path:
    """The function that writes `k` and `v` to their slots."""
    pool_dtype: torch.dtype | None = getattr(torch, workload.kv_dtype, None)

    def put_kv(
        k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor, scale: Tensor | None
    ) -> None:
        k_slots[slots] = stored(k, pool_dtype, scale)
        v_slots[slots] = stored(v, pool_dtype, scale)

    def put_row(
        k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor, scale: Tensor | None
    ) -> None:
        k_slots[slots] = stored(torch.cat((v, k), dim=-1), pool_dtype, scale)

    def put_packed_row(
        k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor, scale: Tensor | None
    ) -> None:
        tiles = v.float().unflatten(-1, (-1, 128))
        scales = (tiles.abs().amax(dim=-1, keepdim=True) / 448.0).clamp_min(1e-30)
        latent = stored(tiles, torch.float8_e4m3fn, scales).flatten(-2)
        parts = (scales.squeeze(-1), k.to(torch.bfloat16))
        k_slots[slots] = torch.cat((latent, *[part.view(torch.uint8) for part in parts]), dim=-1)

    if workload.mla:
        return put_packed_row if workload.kv_dtype == "fp8_ds_mla" else put_row
    return put_kv


def stored(x: Tensor, dtype: torch.dtype | None, scale: Tensor | None) -> Tensor:
    """`x` as an indexed pool takes it; fp8 divided, clamped, cast and seen as bytes."""
    if scale is None or dtype is None or dtype.itemsize > 1:
        return x
    largest = torch.finfo(dtype).max
    return (x / scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
