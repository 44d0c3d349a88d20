"""Binds a call of each op: the kernel is specialised and compiled once, and a launch collects the
addresses of its tensors and makes one driver call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor

from ropool.backends.cuda import compile, driver
from ropool.backends.cuda.choose import shape_of
from ropool.backends.cuda.grid import Grid, grid_of
from ropool.backends.cuda.prelude import prelude, switches
from ropool.backends.cuda.shape import Shape, narrowed
from ropool.backends.cuda.specialise import (
    LONG_VECTOR_BYTES,
    VECTOR_BYTES,
    Call,
    Describer,
    kv_planes,
    mla_planes,
    power_of_2,
)
from ropool.dispatch.key import Key, Options

Args = tuple[Tensor | None, ...]
Launch = Callable[[Args], None]
Names = tuple[tuple[str, ...], ...]
"""The kernel's names for each of an op's tensors; a tensor may have two roles."""

_functions: dict[tuple[str, int], tuple[Any, int]] = {}
"""(source, device) -> the kernel, which keeps its module loaded, and its function."""

_VECTORS = frozenset(("q", "k", "v", "k_pool", "v_pool", "table", "q_norm", "k_norm", "q_out"))
"""Pointers that are accessed in vectors; the others need no more than their element's alignment."""


def _names(text: str) -> Names:
    return tuple(tuple(names.split("+")) for names in text.split())


ARGUMENTS = {
    "rope_": _names("q k table positions offsets"),
    "rope_store_kv_": _names(
        "q k v k_pool v_pool table positions slots offsets q_norm k_norm k_scale v_scale q_out "
        "q_scale window"
    ),
    "store_kv_": _names("k v k_pool v_pool slots k_scale v_scale window"),
    "store_mla_": _names("v k v_pool+k_pool slots v_scale+k_scale window"),
    "rope_store_mla_": _names(
        "q v k v_pool+k_pool table positions slots offsets v_scale+k_scale q_out q_scale window"
    ),
}


def longest_vector(key: Key, device: int) -> int:
    """Bytes of the longest vector that a call's kernel moves at once on `device`."""
    wide = torch.cuda.get_device_capability(device) >= (10, 0)
    return LONG_VECTOR_BYTES if wide and key.op == "store_mla_" else VECTOR_BYTES


def describe(key: Key, args: Args, options: Options, align: Callable[[str], int]) -> Call:
    """What a call of `key.op` needs of the kernel, when `align(name)` divides the addresses."""
    describer = Describer(key, ARGUMENTS[key.op], args, align)
    if key.rotary_dim:
        describer.rotation(options)
        describer.queries(key.heads_q, key.head_dim, key.rotary_dim)
        describer.constants(WRITE_K=options.write_k or key.op == "rope_")
    if key.latent_dim:
        mla_planes(describer)
    elif key.op == "rope_":
        describer.keys_and_values(key.heads_kv, key.head_dim, key.rotary_dim, 0, 1)
    else:
        describer.keys_and_values(
            key.heads_kv, key.head_dim, key.rotary_dim, key.heads_kv, key.v_head_dim
        )
        kv_planes(describer, options)
        describer.norm_eps(options.norm_eps)
    if key.slot_dtype is not None:
        describer.slots(options)
    return describer.call


def describe_aligned(key: Key, args: Args, options: Options, device: int) -> Call:
    """`describe` for addresses that allow the longest vectors of `device`."""
    longest = longest_vector(key, device)
    return describe(key, args, options, lambda _: longest)


def source_of(call: Call, shape: Shape, grid: Grid) -> str:
    """The whole text of a specialised kernel."""
    files = ["dependent", "slots"]
    if not shape.bulk:
        files += ["stores", "rotation", "rows", "turned", "copied"]
    parts = [
        switches(shape),
        *(compile.source(f"{name}.cuh") for name in ("memory", "formats")),
        prelude(call, shape, grid),
        *(compile.source(f"{name}.cuh") for name in files),
        compile.source("bulk.cu" if shape.bulk else "heads.cu"),
    ]
    return "\n".join(parts)


def _launcher(call: Call, device: int) -> driver.Launcher:
    """Compile the kernel of `call`, unless it is loaded already, and prepare its launch."""
    gpu = torch.cuda.get_device_properties(device)
    arch = f"sm_{gpu.major}{gpu.minor}"
    shape = shape_of(call, arch, gpu.multi_processor_count, gpu.name)
    call = narrowed(call, shape)
    grid = grid_of(call, shape)
    text = source_of(call, shape, grid)
    found = _functions.get((text, device))
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"ropool.{call.key.op}: the kernel for {call.key.describe()} is not loaded, and "
                "cannot be while a CUDA graph is captured; warm up by calling the op once with "
                "tensors of the same shapes, strides and alignment before the capture"
            )
        with torch.cuda.device(device):
            torch.cuda.current_stream()
            kernel = compile.load(text, arch)
            found = _functions[text, device] = kernel, driver.function_of(kernel)
    return driver.Launcher(
        found[1],
        device,
        grid.blocks,
        shape.threads,
        len(call.pointers),
        list(call.scalars.values()),
        shape.dependent,
    )


def bind(key: Key, args: Args, options: Options) -> Launch:
    """Bind any of the five ops."""
    first = args[0]
    assert first is not None
    device = first.get_device()
    # A launch outlives the tensors of its first call.
    shapes = tuple(
        tensor
        if tensor is None
        else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        for tensor in args
    )
    longest = longest_vector(key, device)
    aligned = describe_aligned(key, shapes, options, device)
    if aligned.scalars.get("max_position", 1) == 0:
        return lambda args: None  # every position is outside of an empty table
    tensors_of = itemgetter(*(index for _, index in aligned.pointers))
    vectors = [at for at, (name, _) in enumerate(aligned.pointers) if name in _VECTORS]
    vectors_of = itemgetter(*vectors)
    alignment = functools.partial(power_of_2, most=longest)
    launchers: dict[tuple[int, ...], driver.Launcher] = {(): _launcher(aligned, device)}

    def launcher_for(alignments: tuple[int, ...]) -> driver.Launcher:
        names = [aligned.pointers[at][0] for at in vectors]
        known = dict(zip(names, alignments, strict=True))
        return _launcher(describe(key, shapes, options, known.__getitem__), device)

    def prepared(args: Args) -> tuple[driver.Launcher, list[int]]:
        addresses = [tensor.data_ptr() for tensor in tensors_of(args)]
        low_bits = functools.reduce(or_, vectors_of(addresses)) % longest
        alignments = tuple(map(alignment, vectors_of(addresses))) if low_bits else ()
        launcher = launchers.get(alignments)
        if launcher is None:
            launcher = launchers[alignments] = launcher_for(alignments)
        return launcher, addresses

    def launch(args: Args) -> None:
        launcher, addresses = prepared(args)
        launcher(addresses)

    def freeze(args: Args) -> Callable[[], None]:
        launcher, addresses = prepared(args)
        return launcher.frozen(addresses)

    launch.freeze = freeze  # type: ignore[attr-defined]
    native = launchers[()].native(
        [(index, longest - 1 if name in _VECTORS else 0) for name, index in aligned.pointers]
    )
    if native is not None:
        launch.native = native  # type: ignore[attr-defined]
    return launch
