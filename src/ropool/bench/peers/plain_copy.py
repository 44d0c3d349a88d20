"""A copy of as many bytes as an op must move, 16 bytes a thread: what memory allows, launch
included. `copy.pdl` is launched so that it may start while the copy before it drains."""

from __future__ import annotations

from functools import partial

import torch

from ropool.bench.inputs import Inputs
from ropool.bench.peers.package import needs
from ropool.bench.provider import Call, Provider
from ropool.bench.traffic import min_bytes
from ropool.bench.workload import Workload

THREADS = 256
VECTOR_BYTES = 16
SOURCE = """
struct Params { const uint4* from; uint4* to; long long count; };
extern "C" __global__ void __launch_bounds__(THREADS) ropool_kernel(
    const __grid_constant__ Params p) {
#if DEPENDENT
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (i < p.count) p.to[i] = p.from[i];
}
"""


def vectors(workload: Workload) -> int:
    """How many vectors are read, and as many written: together the minimum bytes, rounded up."""
    return -(-min_bytes(workload) // (2 * VECTOR_BYTES))


def prepare(workload: Workload, x: Inputs) -> None:
    """Buffers of its own for each set, shared by both forms."""
    if "copy" not in x.extra:
        shape = (2, vectors(workload) * VECTOR_BYTES)
        x.extra["copy"] = torch.randint(0, 256, shape, dtype=torch.uint8, device=x.slots.device)


def source(dependent: bool) -> str:
    """The text of the kernel."""
    return f"#define DEPENDENT {int(dependent)}\n#define THREADS {THREADS}\n{SOURCE}"


def build(dependent: bool, workload: Workload) -> Call:
    """Compile the copy for the current device."""
    from ropool.backends.cuda import compile, driver

    device = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(device)
    torch.cuda.current_stream()
    kernel = compile.load(source(dependent), f"sm_{major}{minor}")
    function = driver.function_of(kernel)
    count = vectors(workload)
    blocks = -(-count // THREADS)
    launch = driver.Launcher(function, device, blocks, THREADS, 2, [count], dependent)

    def copy(x: Inputs) -> None:
        origin, target = x.extra["copy"].unbind()
        launch((origin.data_ptr(), target.data_ptr()))

    copy.kernel = kernel  # type: ignore[attr-defined]  # keeps its module loaded
    return copy


def verify(call: Call, x: Inputs) -> str | None:
    """The target holds the source."""
    origin, target = x.extra["copy"].unbind()
    target.zero_()
    call(x)
    return None if torch.equal(origin, target) else "the copy differs from its source"


PROVIDERS = tuple(
    Provider(
        name=name,
        version=lambda: "",
        unavailable=needs("cuda.core"),
        build=partial(build, dependent),
        prepare=prepare,
        verify=verify,
    )
    for name, dependent in (("copy", False), ("copy.pdl", True))
)
