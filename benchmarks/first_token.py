"""How long `ropool generate` takes from the start of its process to the first token, when the model
was converted before, and where the time goes.

    python benchmarks/first_token.py --out benchmarks/results/engine-cpu-amd-epyc-avx512-2c
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ropool.cli.bench import load_average, machine

PROMPT = "What is the capital of France?"
STARTS = 5
GENERATE = "import sys; from ropool.cli.main import main; sys.exit(main())"

STAGES = """
import json, sys
from ropool.cli.probes import process_seconds

seconds, before = {}, 0.0

def stage(name):
    global before
    now = process_seconds()
    seconds[name], before = round(now - before, 2), now

stage("interpreter, torch, ropool")
import ropool.cli.generate
stage("transformers")
from transformers import AutoConfig, AutoTokenizer
from ropool.engine import Engine
from ropool.integrations.transformers.families import family_of
from ropool.integrations.transformers.load import find
from ropool.integrations.transformers.model import PooledModel
source = find("smollm2", print)
config = AutoConfig.from_pretrained(source)
auto_class = family_of(config.model_type).auto_class
stage("config")
tokenizer = AutoTokenizer.from_pretrained(source)
stage("tokenizer")
model = auto_class.from_pretrained(source, config=config)
stage("the library's model, with weights")
pooled = PooledModel(model.eval())
stage("weights for our layers")
message = [{"role": "user", "content": sys.argv[1]}]
tokens = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
engine = Engine(pooled, tokenizer, pool_tokens=256)
engine.add(list(tokens["input_ids"]))
stage("pool and prompt")
engine.step()
stage("first step")
print(json.dumps(seconds))
"""


def last_line(*arguments: str) -> Any:
    """What a process of its own prints last, read as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write first_token.json here")
    args = parser.parse_args()
    load = load_average()
    found = []
    for _ in range(STARTS + 1):  # the first converts the model, where it has to
        report = last_line(GENERATE, "generate", PROMPT, "--max-new-tokens", "4", "--json")
        found.append(report["seconds_to_first_token"])
    stages = [last_line(STAGES, PROMPT) for _ in range(3)]
    result = {
        "model": "smollm2",
        "seconds_to_first_token": statistics.median(found[1:]),
        "of_starts": found[1:],
        "stages_seconds": {
            name: statistics.median(run[name] for run in stages) for name in stages[0]
        },
        "machine": machine(torch.device("cpu"), load),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "first_token.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
