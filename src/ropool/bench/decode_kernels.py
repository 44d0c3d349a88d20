"""What can stand in the place of `rope_store_kv_` and `rope_store_mla_` in a decode step: functions
of the same arguments, made for one step. The pools have the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropool.bench.peers.package import Unavailable, needs
from ropool.bench.peers.sglang import NOT_RESERVED
from ropool.bench.peers.sglang import kernels as sglang_kernels
from ropool.bench.peers.vllm import ops as vllm_ops
from ropool.engine.step import Step

Function = Callable[..., Tensor | None]
"""Takes the arguments of the op. Returns the rotated query when it is not written in place, which
stands for `rope_store_kv_` only."""
For = Callable[[Step], Function]


@dataclass(frozen=True, slots=True)
class Kernels:
    """How to rotate and store; `None`: there is no such kernel. With neither, the op itself."""

    unavailable: Unavailable
    rope_store_kv: For | None
    rope_store_mla: For | None


def sglang_fused(step: Step) -> Function:
    run = sglang_kernels("attention.rope").apply_rope_inplace_with_kvcache

    def call(
        q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor,
        positions: Tensor, slots: Tensor, *, interleaved: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        rows = [pool.flatten(0, 1).flatten(1) for pool in (k_pool, v_pool)]
        run(q, k, v, *rows, table, positions, slots, is_neox=not interleaved)

    return call


def sglang_unfused(step: Step) -> Function:
    rotate = sglang_kernels("attention.rope").apply_rope_inplace
    put = sglang_kernels("kvcache.kvcache").store_cache

    def call(
        q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor,
        positions: Tensor, slots: Tensor, *, interleaved: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        rotate(q, k, table, positions, is_neox=not interleaved)
        rows = [pool.flatten(0, 1).flatten(1) for pool in (k_pool, v_pool)]
        put(k.flatten(1), v.flatten(1), *rows, slots, reserved_skip_index=NOT_RESERVED)

    return call


def sglang_mla(step: Step) -> Function:
    rotate = sglang_kernels("attention.rope").apply_rope_inplace
    put = sglang_kernels("kvcache.set_mla_kv_buffer").set_mla_kv_buffer

    def call(
        q: Tensor, k_nope: Tensor, k_rope: Tensor, pool: Tensor, table: Tensor, positions: Tensor,
        slots: Tensor, *, interleaved: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        # The kernel wants one head stride for both; the key's only head has whichever is named.
        k = k_rope.as_strided((len(k_rope), 1, k_rope.shape[1]), (k_rope.stride(0), q.stride(1), 1))
        rotate(q, k, table, positions, is_neox=not interleaved)
        put(pool.flatten(0, 1), slots, k_nope, k_rope, reserved_skip_index=NOT_RESERVED)

    return call


def vllm_kv(step: Step) -> Function:
    general, cache = vllm_ops()
    one = torch.ones(1, device=step.slots.device)
    tables: dict[int, Tensor] = {}

    def call(
        q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor,
        positions: Tensor, slots: Tensor, *, interleaved: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        rounded = once(tables, table, q.dtype)
        general.rotary_embedding(positions, q, k, q.shape[2], rounded, not interleaved, 0, False)
        cache.reshape_and_cache_flash(k, v, k_pool, v_pool, slots, "auto", one, one)

    return call


def vllm_mla(step: Step) -> Function:
    general, cache = vllm_ops()
    one = torch.ones(1, device=step.slots.device)
    tables: dict[int, Tensor] = {}

    def call(
        q: Tensor, k_nope: Tensor, k_rope: Tensor, pool: Tensor, table: Tensor, positions: Tensor,
        slots: Tensor, *, interleaved: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        k, rounded = k_rope.unsqueeze(1), once(tables, table, q.dtype)
        general.rotary_embedding(positions, q, k, q.shape[2], rounded, not interleaved, 0, False)
        cache.concat_and_cache_mla(k_nope, k_rope, pool, slots, "auto", one, False)

    return call


def once(made: dict[int, Tensor], table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table in the model's dtype, made at the first layer of the warm-up."""
    key = id(table)
    if key not in made:
        made[key] = table.to(dtype)
    return made[key]


def angles(made: dict[str, Any], table: Tensor, positions: Tensor, dtype: torch.dtype) -> Any:
    """cos and sin of the step's positions, `[1, T, R]`; `transformers` computes them once a step,
    so they are made once here, at the first layer."""
    if "angles" not in made:
        cos, sin = table[positions].to(dtype).chunk(2, dim=-1)
        made["angles"] = tuple(torch.cat((x, x), dim=-1).unsqueeze(0) for x in (cos, sin))
    return made["angles"]


def transformers_kv(step: Step) -> Function:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    made: dict[str, Any] = {}

    def call(
        q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor,
        positions: Tensor, slots: Tensor, **_: Any,
    ) -> Tensor:  # fmt: skip
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
        turned = apply_rotary_pos_emb(*heads, *angles(made, table, positions, q.dtype))
        k_pool.flatten(0, 1)[slots] = turned[1][0].transpose(0, 1)
        v_pool.flatten(0, 1)[slots] = v
        return turned[0][0].transpose(0, 1)

    return call


def transformers_mla(step: Step) -> Function:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        apply_rotary_pos_emb_interleave,
    )

    made: dict[str, Any] = {}

    def call(
        q: Tensor, k_nope: Tensor, k_rope: Tensor, pool: Tensor, table: Tensor, positions: Tensor,
        slots: Tensor, **_: Any,
    ) -> None:  # fmt: skip
        heads = q.transpose(0, 1).unsqueeze(0), k_rope[None, None]
        turned = apply_rotary_pos_emb_interleave(*heads, *angles(made, table, positions, q.dtype))
        # Its own code copies too: it joins both parts of the query.
        q.copy_(turned[0][0].transpose(0, 1))
        pool.flatten(0, 1)[slots] = torch.cat((k_nope, turned[1][0, 0]), dim=-1)

    return call


def nothing(step: Step) -> Function:
    """Rotates and stores nothing: what would be left of the step if the op were free. Not for MLA:
    the layers there have experts, and other experts are chosen when the values change."""
    return lambda *tensors, **options: None


NOTHING = "none"
KERNELS = {
    "ropool": Kernels(lambda device: None, None, None),
    NOTHING: Kernels(lambda device: None, nothing, None),
    "sglang": Kernels(needs("sglang", "tvm_ffi"), sglang_fused, None),
    "sglang.unfused": Kernels(needs("sglang", "tvm_ffi"), sglang_unfused, sglang_mla),
    "vllm.unfused": Kernels(needs("vllm"), vllm_kv, vllm_mla),
    "transformers": Kernels(needs("transformers"), transformers_kv, transformers_mla),
}
"""By name."""
