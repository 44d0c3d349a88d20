"""Times the `cuda` backend's kernels on this GPU beside a plain copy of the same minimum bytes.

    python benchmarks/cuda_kernels.py --out results.csv

Every point is a CUDA graph of many calls, each with buffers of its own, replayed with a cold L2:
the median of 17 replays over the number of calls. Each op is first compared with the reference.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

import ropool
from ropool.backends.cuda import compile, driver

MODEL = torch.bfloat16
TABLE_ROWS = 8192
ROTATE_BYTES = 400 << 20
MAX_CALLS = 160
REPLAYS = 17

COPY = """
struct Params { const uint4* from; uint4* to; long long count; };
extern "C" __global__ void __launch_bounds__(256) ropool_kernel(const __grid_constant__ Params p) {
#if PDL
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const long long i = blockIdx.x * 256ll + threadIdx.x;
  if (i < p.count) p.to[i] = p.from[i];
}
"""


class Copy:
    """Copies `bytes` / 2, 16 bytes a thread: reads and writes are the op's minimum bytes."""

    def __init__(self, bytes: int, dependent: bool) -> None:
        self.count = max(bytes // 32, 1)
        major, minor = torch.cuda.get_device_capability()
        text = f"#define PDL {int(dependent)}\n{COPY}"
        self.kernel = compile.load(text, f"sm_{major}{minor}")
        function = driver.function_of(self.kernel)
        grid = (self.count + 255) // 256
        self.launcher = driver.Launcher(function, 0, grid, 256, 2, [self.count], dependent)

    def calls(self, count: int) -> list[Callable[[], None]]:
        source = torch.empty(count, self.count * 16, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        rows = [(source[i].data_ptr(), target[i].data_ptr()) for i in range(count)]
        self.keep = source, target
        return [lambda row=row: self.launcher(row) for row in rows]


class Workload:
    """One op at one shape: builds independent argument sets and counts the bytes it must move."""

    def __init__(self, op: str, heads: str, tokens: int, **options: Any) -> None:
        self.op, self.heads, self.tokens, self.options = op, heads, tokens, options
        self.label = "+".join([op, *(f"{k}={v}" for k, v in options.items())])

    def arguments(self) -> tuple[dict[str, Any], int]:
        T, o = self.tokens, self.options
        kv = o.get("kv", "bfloat16")
        pool_dtype = getattr(torch, kv) if kv != "ds_mla" else torch.uint8
        slots = max(2 * T, 64)
        table = _table(o.get("rotary") or self._dim())
        positions = torch.randint(0, TABLE_ROWS, (T,), device="cuda")
        mapping = torch.randperm(slots, device="cuda")[:T]
        if o.get("slots") == "ordered":
            mapping = torch.arange(T, device="cuda")
        if "mla" in self.op:
            hq, L, R = map(int, self.heads.split("x"))
            row = torch.randn(T, L + R, device="cuda", dtype=MODEL)
            width = 656 if kv == "ds_mla" else L + R
            pool = torch.zeros(slots, width, device="cuda", dtype=pool_dtype)
            args = {"k_nope": row[:, :L].contiguous(), "k_rope": row[:, L:].contiguous()}
            args |= {"pool": pool, "slot_mapping": mapping}
            count = T * ((L + R) * 2 + width * pool.element_size() + 8)
            if self.op == "rope_store_mla_":
                q = torch.randn(T, hq, R, device="cuda", dtype=MODEL)
                args |= {"q_rope": q, "cos_sin_cache": table, "positions": positions}
                count += T * (hq * R * 2 * 2 + 8)
                if o.get("q_out"):
                    args["q_out"] = torch.empty_like(q, dtype=getattr(torch, o["q_out"]))
                    count -= T * hq * R
            return args, count
        hq, hk, D = map(int, self.heads.split("x"))
        if o.get("packed", True):
            qkv = torch.randn(T, (hq + 2 * hk) * D, device="cuda", dtype=MODEL)
            q, k, v = (
                part.unflatten(1, (-1, D)) for part in qkv.split((hq * D, hk * D, hk * D), dim=1)
            )
        else:
            q = torch.randn(T, hq, D, device="cuda", dtype=MODEL)
            k, v = torch.randn(2, T, hk, D, device="cuda", dtype=MODEL)
        args = {"k": k, "v": v, "slot_mapping": mapping, "layout": "slots"}
        args["k_pool"], args["v_pool"] = torch.zeros(
            2, slots, hk, D, device="cuda", dtype=torch.bfloat16
        ).to(pool_dtype)
        size = pool_dtype.itemsize
        count = T * (2 * hk * D * (2 + size) + 8)
        if o.get("scale"):
            args["k_scale"] = torch.tensor([0.7], device="cuda")
            args["v_scale"] = torch.tensor([1.3], device="cuda")
        if self.op == "store_kv_":
            return args, count
        args |= {"q": q, "cos_sin_cache": table, "positions": positions}
        count += T * (hq * D * 2 * 2 + 8)
        if self.op == "rope_":
            for name in ("v", "slot_mapping", "layout", "k_pool", "v_pool"):
                del args[name]
            return args, T * ((hq + hk) * D * 4 + 8)
        if o.get("q_out"):
            args["q_out"] = torch.empty(q.shape, device="cuda", dtype=getattr(torch, o["q_out"]))
            count -= T * hq * D
        if o.get("norm"):
            args["q_norm_weight"], args["k_norm_weight"] = torch.rand(2, D, device="cuda") + 0.5
        args["write_k"] = bool(o.get("write_k"))
        count += T * hk * D * 2 * bool(o.get("write_k"))
        return args, count

    def _dim(self) -> int:
        return int(self.heads.split("x")[2])

    def check(self) -> bool:
        """Whether the backend and the reference agree, to the rounding of the storage."""
        ours, _ = self.arguments()
        theirs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in ours.items()}
        getattr(ropool, self.op)(**ours, backend="cuda")
        getattr(ropool, self.op)(**theirs, backend="reference")
        for name, got in ours.items():
            if isinstance(got, torch.Tensor) and got.dtype is not torch.uint8:
                want = theirs[name].double()
                error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
                if not error < (4e-3 if got.element_size() > 1 else 3e-2):
                    print("wrong:", self.label, name, float(error), file=sys.stderr)
                    return False
        return True


_tables: dict[int, torch.Tensor] = {}


def _table(width: int) -> torch.Tensor:
    if width not in _tables:
        frequency = 10000.0 ** (-torch.arange(0, width, 2, device="cuda").double() / width)
        angle = torch.arange(TABLE_ROWS, device="cuda").double()[:, None] * frequency
        _tables[width] = torch.cat((angle.cos(), angle.sin()), dim=1).float()
    return _tables[width]


_flush: list[torch.Tensor] = []


def time_calls(
    calls: list[Callable[[], None]], replays: int = REPLAYS
) -> tuple[float, float, float]:
    """p20, p50 and p80 in microseconds a call."""
    if not _flush:
        _flush.append(torch.zeros(512 << 20, dtype=torch.uint8, device="cuda"))
    graph = torch.cuda.CUDAGraph()
    calls[0]()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        _flush[0].view(torch.int32).max()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The first node waits for the flush; its own share of the chain is small.
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    times = sorted(times[2:])
    at = lambda q: times[min(int(q * len(times)), len(times) - 1)]  # noqa: E731
    return at(0.2), statistics.median(times), at(0.8)


def throw_away() -> None:
    """The first graphs of a process run faster than later ones."""
    torch.zeros(1, device="cuda")
    copy = Copy(1 << 20, False)
    for _ in range(8):
        time_calls(copy.calls(50), 3)


def op_calls(work: Workload, count: int) -> list[Callable[[], None]]:
    function = getattr(ropool, work.op)
    sets = [work.arguments()[0] for _ in range(count)]
    return [lambda args=args: function(**args, backend="cuda") for args in sets]


def calls_for(bytes: int) -> int:
    return max(min(ROTATE_BYTES // bytes, MAX_CALLS), 6)


def measure(work: Workload, copies: bool = True) -> list[dict[str, Any]]:
    _, bytes = work.arguments()
    count = calls_for(bytes)
    correct = work.check() if work.tokens <= 4096 else ""
    providers: list[tuple[str, Callable[[], list[Callable[[], None]]]]] = [
        ("ropool.cuda", lambda: op_calls(work, count))
    ]
    if copies:
        plain, dependent = Copy(bytes, False), Copy(bytes, True)
        providers += [
            ("copy", lambda: plain.calls(count)),
            ("copy.pdl", lambda: dependent.calls(count)),
        ]
    rows = []
    for provider, make in providers:
        p20, p50, p80 = time_calls(make())
        rows.append(
            {
                "op": work.label,
                "provider": provider,
                "heads": work.heads,
                "tokens": work.tokens,
                "min_bytes": bytes,
                "p20_us": round(p20, 3),
                "p50_us": round(p50, 3),
                "p80_us": round(p80, 3),
                "gbps": round(bytes / p50 / 1e3),
                "correct": correct,
            }
        )
        torch.cuda.empty_cache()
    return rows


def standard(tokens: list[int]) -> list[Workload]:
    shapes = ["32x8x128", "64x8x128", "8x1x128", "64x8x64", "40x8x128", "16x16x128", "9x3x64"]
    few = [t for t in tokens if t in (1, 32, 512, 8192, 32768)]
    works = [Workload("rope_store_kv_", "32x8x128", t) for t in tokens]
    works += [Workload("rope_store_kv_", s, t) for s in shapes[1:] for t in few]
    fp8 = {"kv": "float8_e4m3fn", "scale": True, "q_out": "float8_e4m3fn"}
    works += [Workload("rope_store_kv_", "32x8x128", t, **fp8) for t in tokens]
    works += [Workload("rope_store_kv_", "32x8x128", t, norm=True) for t in tokens]
    works += [Workload("rope_store_kv_", "64x8x128", t, norm=True) for t in few]
    works += [Workload("store_kv_", "32x8x128", t) for t in tokens]
    works += [Workload("rope_", "32x8x128", t) for t in tokens]
    works += [Workload("store_mla_", "1x512x64", t) for t in [*tokens, 65536]]
    works += [Workload("rope_store_mla_", "128x512x64", t) for t in tokens]
    works += [
        Workload("rope_store_mla_", "128x512x64", t, kv="float8_e4m3fn", q_out="float8_e4m3fn")
        for t in tokens
    ]
    return works


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="cuda_kernels.csv")
    parser.add_argument("--tokens", default="1,8,32,128,512,2048,8192,32768")
    parser.add_argument("--only", default="", help="substring of the op's label")
    arguments = parser.parse_args()
    throw_away()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for work in standard([int(t) for t in arguments.tokens.split(",")]):
            if arguments.only not in work.label:
                continue
            rows += measure(work)
            times = " ".join(f"{row['provider']} {row['p50_us']:.2f}" for row in rows[-3:])
            print(f"{work.label} {work.heads} T={work.tokens}: {times}", flush=True)
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
