"""Decoding by the engine beside `generate` of `transformers`, on the CPU in float32.

    python benchmarks/decode.py --out benchmarks/results/engine-cpu-amd-epyc-avx512-2c

Both get the same prompts, of different lengths where there are several (`transformers` then pads
them on the left), and answer greedily with as many tokens. `transformers` runs twice, with its
`DynamicCache` and its `StaticCache`; all take turns, round after round, in one process. Tokens per
second are those after each request's first, so prompts are not in them.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_models import FAMILIES, REAL, pair

from ropool.cli.bench import load_average, machine
from ropool.engine import Engine, SamplingParams
from ropool.integrations.transformers import PooledModel

PROMPT = 48
NEW_TOKENS = 24
BATCHES = (1, 16)
ROUNDS = 5

Answers = list[list[int]]
Contestant = Callable[[], tuple[float, Answers]]


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def by_engine(model: PooledModel, prompts: Answers) -> Contestant:
    """Decode seconds and answers of the engine."""
    model.spec = dataclasses.replace(model.spec, eos_ids=frozenset())
    slots = sum(-(-(len(prompt) + NEW_TOKENS) // 16) * 16 for prompt in prompts)

    def run() -> tuple[float, Answers]:
        # All prompts in one step, so that all requests have their first token at once.
        engine = Engine(
            model,
            pool_tokens=slots,
            max_requests=len(prompts),
            max_batch_tokens=sum(map(len, prompts)),
        )
        params = SamplingParams(max_new_tokens=NEW_TOKENS)
        requests = [engine.add(prompt, params) for prompt in prompts]
        engine.step()
        started = time.perf_counter()
        while engine.unfinished:
            engine.step()
        return time.perf_counter() - started, [request.output for request in requests]

    return run


def by_transformers(model: Any, prompts: Answers, cache: str) -> Contestant:
    """Decode seconds and answers of `generate` with a cache implementation."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]

    def run() -> tuple[float, Answers]:
        clock = Clock()
        tokens = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
            streamer=clock,
        )
        # The streamer is given the prompt first.
        assert len(clock.times) == NEW_TOKENS + 1
        return clock.times[-1] - clock.times[1], tokens[:, longest:].tolist()

    return run


def compare(name: str, batch: int, models: tuple[Any, PooledModel], rounds: int) -> dict[str, Any]:
    """A row of the table."""
    draw = random.Random(batch)
    vocabulary = models[1].spec.vocabulary
    lengths = [PROMPT] if batch == 1 else [draw.randint(PROMPT // 2, PROMPT) for _ in range(batch)]
    prompts = [[draw.randrange(10, vocabulary - 10) for _ in range(n)] for n in lengths]
    contestants = {
        "ropool": by_engine(models[1], prompts),
        "dynamic": by_transformers(models[0], prompts, "dynamic"),
        "static": by_transformers(models[0], prompts, "static"),
    }
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    answers: dict[str, Answers] = {}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for who, run in contestants.items():
                took, answers[who] = run()
                if number:  # the first round warms up
                    seconds[who].append(took)
    tokens = batch * (NEW_TOKENS - 1)
    speed = {who: tokens / statistics.median(taken) for who, taken in seconds.items()}
    alike = [a == b for a, b in zip(answers["ropool"], answers["dynamic"], strict=True)]
    return {
        "model": name,
        "batch": batch,
        **{f"{who}_tokens_per_s": round(value, 1) for who, value in speed.items()},
        "times_faster": round(speed["ropool"] / max(speed["dynamic"], speed["static"]), 2),
        "same_answers": sum(alike),
        "rounds": rounds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*REAL, *FAMILIES]
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(names)} (all)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=BATCHES, metavar="N", help="requests at once (1 16)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(%(default)s)")
    parser.add_argument(
        "--out", type=Path, help="write decode.json and decode.csv here; rows of others are kept"
    )
    args = parser.parse_args()
    load = load_average()
    for name in args.models or names:
        models = pair(name)
        rows = [compare(name, batch, models, args.rounds) for batch in args.batch]
        for row in rows:
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        if args.out is not None:
            write(rows, args.out, load)
    return 0


def write(rows: list[dict[str, Any]], out: Path, load: float | None) -> None:
    """The rows, in the order of the tables, in place of those of the same models."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "decode.json"
    measured = {(row["model"], row["batch"]) for row in rows}
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = rows + [row for row in kept if (row["model"], row["batch"]) not in measured]
    order = [*REAL, *FAMILIES]
    rows.sort(key=lambda row: (order.index(row["model"]), row["batch"]))
    settings = {"dtype": "float32", "prompt_tokens": PROMPT, "new_tokens": NEW_TOKENS}
    described = machine(torch.device("cpu"), load)
    path.write_text(json.dumps({**settings, "rows": rows, "machine": described}, indent=1) + "\n")
    with (out / "decode.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
