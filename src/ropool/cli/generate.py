"""`ropool generate`: text from a model whose KV pool ropool writes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import logging as hub_logging
from transformers.utils import logging

from ropool.cli import probes
from ropool.dispatch import cache, chosen
from ropool.engine import CacheScales, Engine, ModelSpec, Request, SamplingParams
from ropool.engine.cache import KVCache
from ropool.engine.pools import CacheDtype, pool_dtype, row_bytes
from ropool.errors import RopoolError
from ropool.integrations.transformers import load
from ropool.kvcache import MLAFormat
from ropool.kvcache.mha import FP8_DTYPES

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
CACHE_DTYPES: dict[str, CacheDtype | None] = {
    "auto": None,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_ds_mla": MLAFormat.FP8_DS_MLA,
}
MAX_REQUESTS = 64
POOL_BYTES = 2 << 30
"""Most that the pool takes when `--pool-tokens` is not given."""


def add_parser(subparsers: Any) -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "generate", help="generate text with a model whose KV pool ropool writes"
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts-file", metavar="F", help="more prompts, one a line")
    parser.add_argument(
        "--model",
        default="smollm2",
        metavar="smollm2|DIR|FILE.gguf|HUB_ID",
        help="default: smollm2, SmolLM2-135M-Instruct",
    )
    parser.add_argument(
        "--engine",
        default="auto",
        choices=["auto", "torch", "mlx"],
        help="default: mlx on macOS where mlx-lm is installed, otherwise torch",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda", "xpu", "mps"],
        help="default: a GPU if there is one",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="default: float32 on a CPU, bfloat16 elsewhere",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=CACHE_DTYPES,
        help="of the KV pool; default: the model's",
    )
    parser.add_argument(
        "--kv-cache-scales",
        default="auto",
        metavar="auto|one|FILE",
        help="of an fp8 pool; default: those that the model's files have, or else calibrated on "
        "the prompts",
    )
    parser.add_argument(
        "--save-kv-cache-scales", metavar="FILE", help="write the scales that were used as JSON"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="a prompt; default: %(default)s",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="sample among the likeliest tokens that add up to X; default: %(default)s, all",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of every prompt; default: %(default)s"
    )
    parser.add_argument(
        "--pool-tokens", type=int, metavar="N", help="slots of the KV pool; default: what is needed"
    )
    parser.add_argument(
        "--no-chat-template", action="store_true", help="continue the prompt as it stands"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no text")


def run(args: argparse.Namespace) -> int:
    """Generate, print, and return the exit code. Raises `RopoolError` for what the caller can
    mend."""
    params = SamplingParams(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    prompts = _prompts(args)
    if args.save_kv_cache_scales is not None:
        _check_scales_file(args)
    cache.clear()  # `chosen` is then what this run bound
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    opened = _open_mlx(args) if _engine_kind(args.engine) == "mlx" else _open_torch(args)
    model, tokenizer = opened.model, opened.tokenizer
    tokens = [_encode(tokenizer, prompt, chat=not args.no_chat_template) for prompt in prompts]
    cache_dtype = CACHE_DTYPES[args.kv_cache_dtype]
    if args.pool_tokens is None:
        slot_bytes = row_bytes(model.spec.row, pool_dtype(model.spec, cache_dtype))
        most = POOL_BYTES // (slot_bytes * len(model.spec.windows))
        context = model.spec.max_position
        pool_tokens = _pool_tokens([len(prompt) for prompt in tokens], params, context, most)
    else:
        pool_tokens = args.pool_tokens
    engine = opened.engine(
        model,
        tokenizer,
        pool_tokens=pool_tokens,
        cache_dtype=cache_dtype,
        cache_scales=_scales(args.kv_cache_scales, model.spec),
        max_requests=MAX_REQUESTS,
    )
    requests = [engine.add(prompt, params) for prompt in tokens]
    first_token = _generate(engine, requests, prompts, show=not args.json)
    if args.save_kv_cache_scales is not None:
        assert engine.cache.scales is not None  # an fp8 pool has them after its first step
        engine.cache.scales.write(Path(args.save_kv_cache_scales), model.spec)
    if args.json:
        report = _report(args.model, opened.device, engine, requests, prompts)
        print(json.dumps(report | {"seconds_to_first_token": first_token}))
    else:
        _print_table(opened, engine, first_token)
    return 0


class Opened(NamedTuple):
    """A loaded model, and what runs it."""

    model: Any
    tokenizer: Any
    engine: type[Engine]
    device: str
    device_name: str


def _engine_kind(asked: str) -> str:
    if asked != "auto":
        return asked
    present = sys.platform == "darwin" and importlib.util.find_spec("mlx_lm") is not None
    return "mlx" if present else "torch"


def _tell(message: str) -> None:
    print(f"ropool: {message}", file=sys.stderr, flush=True)


def _open_torch(args: argparse.Namespace) -> Opened:
    device = _device(args.device)
    dtype = _dtype(args.dtype, device.type)
    model, tokenizer = load(args.model, device=device, dtype=dtype, report=_tell)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Opened(model, tokenizer, Engine, device.type, name)


def _open_mlx(args: argparse.Namespace) -> Opened:
    try:
        from ropool.mlx import command
    except ModuleNotFoundError as error:
        raise RopoolError(
            f"engine mlx needs the package {error.name}, which is not installed: "
            "pip install 'ropool[engine,mlx]'"
        ) from error
    if args.save_kv_cache_scales is not None:
        raise RopoolError("--save-kv-cache-scales: the KV pool of engine mlx has no scales to save")
    for option in ("kv_cache_dtype", "kv_cache_scales", "device"):
        value = getattr(args, option)
        allowed = ("auto", "cpu") if option == "device" else ("auto",)
        if value not in allowed:
            flag = "--" + option.replace("_", "-")
            raise RopoolError(f"{flag} is {value}; allowed with engine mlx: {', '.join(allowed)}")
    device = command.use_device(args.device)
    dtype = str(_dtype(args.dtype, device.kind)).removeprefix("torch.")
    model, tokenizer = command.open_model(args.model, dtype, _tell)
    return Opened(model, tokenizer, command.MlxEngine, device.kind, device.name)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        try:
            with Path(args.prompts_file).open(encoding="utf-8-sig") as file:
                prompts += [line.rstrip("\n") for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise RopoolError(f"{args.prompts_file} is not UTF-8 text: {error}") from error
    if not prompts:
        raise RopoolError("no prompt: give one or more PROMPT, or --prompts-file")
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise RopoolError(f"prompt {prompt!r} is not UTF-8 text")
    return prompts


def _device(name: str) -> torch.device:
    backends = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    present = [kind for kind, module in backends.items() if module.is_available()] + ["cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        raise RopoolError(f"device {name} is not available; available: {', '.join(present)}")
    return torch.device(name)


def _dtype(name: str, device: str) -> torch.dtype:
    """On a CPU float32: without bfloat16 instructions bfloat16 halves the time of one request's
    decoding and takes a multiple of it everywhere else."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return DTYPES[name]


def _check_scales_file(args: argparse.Namespace) -> None:
    """Before the work is done that would be lost."""
    if CACHE_DTYPES[args.kv_cache_dtype] not in FP8_DTYPES:
        raise RopoolError(
            f"--save-kv-cache-scales: a KV pool of {args.kv_cache_dtype} has no scales to save"
        )
    path = Path(args.save_kv_cache_scales)
    new = not path.exists()
    path.open("ab").close()
    if new:
        path.unlink()


def _scales(name: str, spec: ModelSpec) -> CacheScales | None:
    if name == "auto":
        return None
    return CacheScales.one(spec) if name == "one" else CacheScales.read(Path(name), spec)


def _encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "return_dict": True}
        try:
            return list(tokenizer.apply_chat_template(message, **options)["input_ids"])
        except Exception as error:  # a template is a program of the model's
            raise RopoolError(
                f"the model's chat template fails: {error} (see --no-chat-template)"
            ) from error
    return list(tokenizer(prompt)["input_ids"])


def _pool_tokens(prompt_tokens: list[int], params: SamplingParams, context: int, most: int) -> int:
    """Room for every request at once, within `most`, but always for the largest one."""
    needs = sorted((tokens + params.max_new_tokens for tokens in prompt_tokens), reverse=True)
    rounded = [-(-min(need, context) // 16) * 16 for need in needs[:MAX_REQUESTS]]
    return max(rounded[0], min(sum(rounded), most))


def _generate(
    engine: Engine, requests: list[Request], prompts: list[str], *, show: bool
) -> float | None:
    """Run to the end. One prompt streams; of several each answer is printed when it is complete.

    Returns how many seconds after the start of the process the first token came.
    """
    numbers = {request: number for number, request in enumerate(requests)}
    first_token: float | None = None
    for number, event in enumerate(engine.stream()):
        if number == 0:
            first_token = probes.process_seconds()
        if not show:
            continue
        if len(requests) == 1:
            print(event.text, end="", flush=True)
        elif event.request.finish_reason is not None:
            place = numbers[event.request]
            print(f"[{place + 1}] {prompts[place]}\n{event.request.text}\n", flush=True)
    if show and len(requests) == 1:
        print("\n")
    return first_token


def _report(
    model: str, device: str, engine: Engine, requests: list[Request], prompts: list[str]
) -> dict[str, Any]:
    allocator = engine.cache.allocator
    return {
        "model": model,
        "device": device,
        "outputs": [
            {
                "prompt": prompt,
                "text": request.text,
                "tokens": request.output,
                "finish_reason": request.finish_reason,
            }
            for prompt, request in zip(prompts, requests, strict=True)
        ],
        "kernels": dict(chosen),
        "prefill_tokens_per_s": engine.throughput.prefill_tokens_per_s,
        "decode_tokens_per_s": engine.throughput.decode_tokens_per_s,
        "pool": {
            "slots": allocator.slots,
            "peak_used": allocator.peak_used_slots,
            "leaked": allocator.used_slots,
            "bytes_per_token": engine.cache.bytes_per_token,
            "window_bytes_per_token": engine.cache.window_bytes_per_token,
        },
    }


def _print_table(opened: Opened, engine: Engine, first_token: float | None) -> None:
    allocator, speed = engine.cache.allocator, engine.throughput
    rows = [("device", f"{opened.device} {opened.device_name}".strip())]
    rows += [(f"kernel of {op}", label) for op, label in chosen.items()]
    if first_token is not None:
        rows.append(("first token", f"after {first_token:.2f} s, from the start of the process"))
    rows += [
        ("prefill", f"{speed.prefill_tokens_per_s:.1f} tokens/s"),
        ("decode", f"{speed.decode_tokens_per_s:.1f} tokens/s"),
        ("pool slots used", f"{allocator.peak_used_slots} of {allocator.slots}"),
        ("pool bytes a token", _token_bytes(engine.cache)),
    ]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")


def _token_bytes(pools: KVCache) -> str:
    if pools.window is None:
        return str(pools.bytes_per_token)
    inside = f"{pools.window_bytes_per_token} inside the window of {pools.window}"
    return f"{pools.bytes_per_token} + {inside}"
