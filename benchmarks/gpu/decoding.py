"""Stage model, generation: decoding of configs/olmo2_1b.toml against bandwidth, and a GRPO step."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import torch
from rl_step import PROMPT_TOKENS, Case, our_step, spent
from training import SIZES

from gpu.clock import fitted, speeds
from gpu.pieces import ROOT, Context, Piece, Result, gated
from megarlx.config import load_config
from megarlx.config.model import ModelConfig
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.model.transformer import Stage


def model_of(context: Context) -> ModelConfig:
    if context.small:
        return SIZES["0.2M"].model
    return load_config(ROOT / "configs" / "olmo2_1b.toml").model


def dtype_on(context: Context) -> torch.dtype:
    return torch.bfloat16 if context.device.type == "cuda" else torch.float32


def bytes_of_a_step(c: ModelConfig, batch: int, seen: float, width: int) -> float:
    """Every weight but the embedding table once, and every key and value that is looked at."""
    weights = c.non_embedding_parameters() + c.vocab_size * c.hidden_size
    return width * (weights + 2 * c.layers * c.kv_heads * c.head_dim * seen * batch)


def requests_of(c: ModelConfig, prompts: int, group: int, length: int, new: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(c.vocab_size, (prompts, length), generator=generator)
    return [
        Request(prompt, list(range(i * group, (i + 1) * group)), new)
        for i, prompt in enumerate(ids.tolist())
    ]


def timed(engine: Engine, requests: list[Request], context: Context, rounds: int) -> float:
    """Median seconds of a generation; the first captures the graphs and is not counted."""
    taken = []
    for number in range(rounds + 1):
        begun = time.perf_counter()
        engine.generate(requests, SamplingSettings(), number)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def decode(context: Context, batch: int) -> Result:
    """Two lengths: their difference is that of decode steps alone, without the prefill."""
    c, dtype = model_of(context), dtype_on(context)
    prompt, (short, long) = context.either((384, (64, 256)), (16, (2, 8)))
    batch = context.either(batch, min(batch, 4))
    stage = Stage(c, dtype=dtype, device=context.device).initialise_(0)
    engine = Engine([stage], slots=batch, longest=prompt + long)
    seconds = {
        new: timed(engine, requests_of(c, batch, 1, prompt, new), context, 3)
        for new in (short, long)
    }
    step = (seconds[long] - seconds[short]) / (long - short)
    seen = prompt + (short + long) / 2
    moved = bytes_of_a_step(c, batch, seen, dtype.itemsize)
    copied = speeds(context.device, context.small)["copy_bytes_per_second"]
    line = {
        "name": "decode step",
        "size": f"batch {batch}, context {seen:.0f}",
        "ours": moved / step / 1e9,
        "baseline": copied / 1e9,
        "baseline_name": "copy",
        "ratio": moved / step / copied,
        "unit": "GB/s",
    }
    return {
        "rows": [gated(line, 0.6 if batch == 1 else 0.5)],
        "milliseconds_a_step": 1e3 * step,
        "tokens_per_second": batch / step,
        "seconds": seconds,
    }


def groups(context: Context) -> Result:
    """512 new tokens for groups of 8 and 64: the prompt of a group is computed once."""
    c, dtype = model_of(context), dtype_on(context)
    prompt, new, samples = context.either((256, 512, 256), (16, 4, 8))
    stage = Stage(c, dtype=dtype, device=context.device).initialise_(0)
    engine = Engine([stage], slots=samples, longest=prompt + new)
    found: Result = {"rows": [], "tokens_per_second": {}}
    for group in context.either((8, 64), (2, 4)):
        requests = requests_of(c, samples // group, group, prompt, new)
        seconds = timed(engine, requests, context, 2)
        found["tokens_per_second"][f"{samples // group} groups of {group}"] = (
            samples * new / seconds
        )
    return found


def growth(context: Context) -> Result:
    """A decode step against the batch."""
    c, dtype = model_of(context), dtype_on(context)
    prompt, (short, long) = context.either((128, (16, 80)), (8, (2, 4)))
    batches = context.either([1, 16, 64, 128, 256, 512], [1, 2])
    stage = Stage(c, dtype=dtype, device=context.device).initialise_(0)
    xs, ts = [], []
    for batch in batches:
        engine = Engine([stage], slots=batch, longest=prompt + long)
        a, b = (
            timed(engine, requests_of(c, batch, 1, prompt, new), context, 2)
            for new in (short, long)
        )
        xs.append(float(batch))
        ts.append(1e3 * (b - a) / (long - short))
        del engine
    return {"rows": [], "batch": {"x": xs, "ms": ts, "fit": fitted(xs, ts)}}


def grpo(context: Context) -> Result:
    """A whole step: what generation and training take, and what of that neither arithmetic nor
    bandwidth asks for."""
    prompts, samples, new = context.either((16, 16, 512), (2, 2, 4))
    c = model_of(context)
    case = Case(c, prompts, samples, new)
    step, objective = our_step(case, device=context.device, dtype=dtype_on(context))
    machine = speeds(context.device, context.small)
    step()
    whole: list[float] = []
    parts: dict[str, list[float]] = {}
    for _ in range(context.either(3, 2)):
        begun = time.perf_counter()
        step()
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        whole.append(time.perf_counter() - begun)
        for name, seconds in spent(objective).items():
            parts.setdefault(name, []).append(seconds)
    split = {name: statistics.median(values) for name, values in parts.items()}
    split["log-probs, training, optimizer"] = statistics.median(whole) - sum(split.values())
    length = PROMPT_TOKENS + new
    trained = c.flops_per_token(length) * prompts * samples * length
    width = dtype_on(context).itemsize
    moved = new * bytes_of_a_step(c, prompts * samples, PROMPT_TOKENS + new / 2, width)
    floors = {
        "generate": moved / machine["copy_bytes_per_second"],
        "log-probs, training, optimizer": trained / machine["product_flop_per_second"],
    }
    neither = 1 - sum(floors.values()) / statistics.median(whole)
    return {
        "rows": [],
        "case": {k: v for k, v in dataclasses.asdict(case).items() if k != "model"},
        "step_seconds": statistics.median(whole),
        "split_seconds": split,
        "floor_seconds": floors,
        "share_neither_arithmetic_nor_bandwidth": neither,
        "logprob_gap": objective.metrics().get("rl/logprob_gap"),
    }


PIECES = [
    Piece("decode-1", 50, functools.partial(decode, batch=1)),
    Piece("decode-256", 50, functools.partial(decode, batch=256)),
    Piece("groups", 60, groups),
    Piece("grpo", 90, grpo),
    Piece("decode-growth", 60, growth),
]
