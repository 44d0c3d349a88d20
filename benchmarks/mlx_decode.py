"""Decode tokens/s of `--engine mlx` beside mlx-lm's own batched generation, in one run.

    python benchmarks/mlx_decode.py --out benchmarks/results/NAME [--cpu] [--batch 1,8]

Both run the same weights, float32 on a CPU and bfloat16 on a GPU, from the same prompts, and take
turns; each figure is the median of the rounds. The rows of other batch sizes in the file are kept.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import statistics
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import batch_generate
from mlx_lm.utils import load_model

from ropool.cli.probes import cpu_model
from ropool.dispatch import chosen
from ropool.engine import SamplingParams
from ropool.engine.engine import Throughput
from ropool.integrations.transformers.load import find
from ropool.mlx.command import use_device
from ropool.mlx.engine import MlxEngine
from ropool.mlx.load import load, rotation_fields


class Endless:
    """As much of a tokenizer as mlx-lm asks for; no token ends an answer."""

    eos_token_ids: tuple[int, ...] = ()

    def decode(self, tokens: list[int]) -> str:
        return ""


def theirs(model: Any, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
    found = batch_generate(model, Endless(), prompts, max_tokens=tokens, return_token_ids=True)
    return found.stats.generation_tps, [list(answer) for answer in found.token_ids]


def ours(engine: MlxEngine, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
    engine.throughput = Throughput()
    requests = engine.generate(prompts, SamplingParams(max_new_tokens=tokens))
    return engine.throughput.decode_tokens_per_s, [request.output for request in requests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = use_device("cpu" if args.cpu else "auto")
    dtype = mx.float32 if device.kind == "cpu" else mx.bfloat16
    folder = Path(find("smollm2", print))
    model, tokenizer = load("smollm2", dtype=dtype)
    reference, _ = load_model(folder, model_config=rotation_fields(folder))
    reference.set_dtype(dtype)
    mx.eval(reference.parameters())
    model.spec = model.spec.__class__(**{**vars(model.spec), "eos_ids": frozenset()})
    text = (Path(__file__).parents[1] / "README.md").read_text()
    words = list(tokenizer(text)["input_ids"])
    rows: list[dict[str, Any]] = []
    for batch in map(int, args.batch.split(",")):
        prompts = [words[at * 17 : at * 17 + args.prompt_tokens] for at in range(batch)]
        engine = MlxEngine(model, pool_tokens=batch * (args.prompt_tokens + args.tokens + 16))
        speeds: dict[str, list[float]] = {"ropool": [], "mlx-lm": []}
        ours(engine, prompts[:1], 2)
        theirs(reference, prompts[:1], 2)
        for _ in range(args.rounds):
            speed, answers = ours(engine, prompts, args.tokens)
            speed_theirs, answers_theirs = theirs(reference, prompts, args.tokens)
            same = sum(a == b for a, b in zip(answers, answers_theirs, strict=True))
            speeds["ropool"].append(speed)
            speeds["mlx-lm"].append(speed_theirs)
        medians = {name: statistics.median(found) for name, found in speeds.items()}
        row = {
            "device": device.name or cpu_model(),
            "dtype": str(dtype).rpartition(".")[2],
            "batch": batch,
            "ropool_tokens_per_s": f"{medians['ropool']:.1f}",
            "mlx_lm_tokens_per_s": f"{medians['mlx-lm']:.1f}",
            "ratio": f"{medians['ropool'] / medians['mlx-lm']:.2f}",
            "same_answers": f"{same} of {batch}",
            "rounds": args.rounds,
            "new_tokens": args.tokens,
            "prompt_tokens": args.prompt_tokens,
            "kernel": " ".join(f"{op}={label}" for op, label in chosen.items()),
            "mlx": importlib.metadata.version("mlx"),
            "mlx_lm": importlib.metadata.version("mlx-lm"),
        }
        print(row, flush=True)
        rows.append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "mlx_decode.csv"
    if path.exists():
        with path.open(newline="") as file:
            measured = {str(row["batch"]) for row in rows}
            rows += [row for row in csv.DictReader(file) if row["batch"] not in measured]
    rows.sort(key=lambda row: int(row["batch"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
