"""What an fp8 KV pool costs in quality and saves in memory, on SmolLM2-135M-Instruct.

    python benchmarks/fp8_quality.py --out benchmarks/results/engine-cpu-amd-epyc-avx512-2c

The model reads windows of the Python documentation that ships with Python (`pydoc_data.topics`)
through the engine's own steps: in chunks, K and V rotated and stored in the pool, attention over
what the pool holds. The perplexity is that of each token but the first of a window after those
before it in the window. Scales are calibrated on a text of another kind: `LICENSE` of this
repository.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import platform
import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

import torch

from ropool.cli.bench import machine
from ropool.engine import CacheScales, Engine, Request, SamplingParams
from ropool.engine.step import build_step
from ropool.integrations.transformers import load

MODEL = "smollm2"
WINDOW = 1024
WINDOWS = 12
CHUNK = 256
CALIBRATION_TEXT = Path(__file__).parents[1] / "LICENSE"
CALIBRATION_TOKENS = 512
POOLS = {
    "model": (None, None),
    "fp8_e4m3": (torch.float8_e4m3fn, "one"),
    "fp8_e4m3 calibrated": (torch.float8_e4m3fn, "calibrated"),
    "fp8_e5m2": (torch.float8_e5m2, "one"),
    "fp8_e5m2 calibrated": (torch.float8_e5m2, "calibrated"),
}


@torch.inference_mode()
def read(engine: Engine, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood of each token but the first, in nats, and the tokens that the
    model held most likely in their places; both `[n - 1]`."""
    spec, cache = engine.model.spec, engine.cache
    request = Request(0, tokens, SamplingParams())
    losses, choices = [], []
    while request.remaining > 0:
        count = min(CHUNK, request.remaining)
        start, end = request.computed, request.computed + count
        assert cache.reserve(request.table, start, end)
        step = build_step([request.span(count, spec)], cache)
        step = dataclasses.replace(step, sample_rows=torch.arange(count))
        logits = engine.model.forward(step)
        request.computed = end
        following = torch.tensor(tokens[start + 1 : end + 1])
        logits = logits[: len(following)]
        losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
        choices.append(logits.argmax(-1))
    cache.release(request.table)
    return torch.cat(losses), torch.cat(choices)


def measure(model: Any, pool: str, windows: list[list[int]], calibration: list[int]) -> Any:
    """Bytes of a token in the pool, and what `read` gives for all windows."""
    dtype, scales = POOLS[pool]
    one = CacheScales.one(model.spec) if scales == "one" else None
    engine = Engine(model, pool_tokens=WINDOW, cache_dtype=dtype, cache_scales=one)
    if scales == "calibrated":
        engine.calibrate([calibration])
    losses, choices = zip(*[read(engine, window) for window in windows], strict=True)
    return engine.cache.bytes_per_token, torch.cat(losses), torch.cat(choices)


def rows_of(dtype: str, windows_wanted: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each pool of a model in `dtype`, and what was read."""
    model, tokenizer = load(MODEL, dtype=getattr(torch, dtype), report=print)
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    tokens = tokenizer(text)["input_ids"]
    windows = [tokens[n * WINDOW : (n + 1) * WINDOW] for n in range(windows_wanted)]
    calibration = tokenizer(CALIBRATION_TEXT.read_text())["input_ids"][:CALIBRATION_TOKENS]
    rows = []
    exact = None
    for pool in POOLS:
        size, losses, choices = measure(model, pool, windows, calibration)
        exact = exact or (size, losses, choices)
        more = losses - exact[1]
        rows.append(
            {
                "model_dtype": dtype,
                "pool": dtype if pool == "model" else pool,
                "perplexity": round(math.exp(losses.mean()), 4),
                "nats_more": round(more.mean().item(), 5),
                "nats_more_stderr": round((more.std() / len(more) ** 0.5).item(), 5),
                "other_choice_percent": round(100 * (choices != exact[2]).float().mean().item(), 2),
                "pool_bytes_per_token": size,
                "bytes_of_exact": round(size / exact[0], 3),
            }
        )
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    read_text = {
        "model": MODEL,
        "text": f"pydoc_data.topics of Python {platform.python_version()}",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens_predicted": len(windows) * (WINDOW - 1),
        "window": WINDOW,
        "chunk": CHUNK,
        "calibrated_on": f"the first {len(calibration)} tokens of {CALIBRATION_TEXT.name}",
    }
    return rows, read_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write fp8_quality.json and fp8_quality.csv here")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="(%(default)s)")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        found, what = rows_of(dtype, args.windows)
        rows += found
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        result = {"read": what, "rows": rows, "machine": machine(torch.device("cpu"), None)}
        (args.out / "fp8_quality.json").write_text(json.dumps(result, indent=1) + "\n")
        with (args.out / "fp8_quality.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
