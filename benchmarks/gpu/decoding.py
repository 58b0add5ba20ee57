"""Generation with configs/olmo2_1b.toml: decode against bandwidth, prefill, a whole GRPO step."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import torch
from rl_step import PROMPT_TOKENS, Case, our_step, spent
from training import SIZES

from gpu.clock import fitted, speeds
from gpu.pieces import ROOT, Context, Piece, Result, gated, note
from gpu.trace import traced
from gpu.training import freed, peak_bf16
from megarlx.config import load_config
from megarlx.config.model import ModelConfig
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.model.transformer import Stage

# A step's share of the copy rate, by batch.
GATES = {1: 0.60, 256: 0.85}


def model_of(context: Context) -> ModelConfig:
    if context.small:
        return SIZES["0.2M"].model
    return load_config(ROOT / "configs" / "olmo2_1b.toml").model


def dtype_on(context: Context) -> torch.dtype:
    return torch.bfloat16 if context.device.type == "cuda" else torch.float32


def stage_of(context: Context, c: ModelConfig) -> Stage:
    return Stage(c, dtype=dtype_on(context), device=context.device).initialise_(0)


def bytes_of_a_step(
    c: ModelConfig, batch: int, seen: float, width: int, layers_width: int | None = None
) -> float:
    """Every weight but the embedding table once, and every key and value that is looked at.

    `layers_width` of a weight of the layers, where it differs.
    """
    layers = (layers_width or width) * c.non_embedding_parameters()
    cached = 2 * c.layers * c.kv_heads * c.head_dim * seen * batch
    return layers + width * (c.vocab_size * c.hidden_size + cached)


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


def decode(context: Context, batch: int, fp8: bool = False) -> Result:
    """Two lengths: their difference is that of decode steps alone, without the prefill."""
    c, width = model_of(context), dtype_on(context).itemsize
    prompt, (short, long) = context.either((384, (64, 256)), (16, (2, 8)))
    batch = context.either(batch, min(batch, 4))
    engine = Engine([stage_of(context, c)], slots=batch, longest=prompt + long, fp8=fp8)
    seconds = {
        new: timed(engine, requests_of(c, batch, 1, prompt, new), context, 2)
        for new in (short, long)
    }
    step = (seconds[long] - seconds[short]) / (long - short)
    seen = prompt + (short + long) / 2
    moved = bytes_of_a_step(c, batch, seen, width, 1 if fp8 else width)
    copied = speeds(context)["copy_bytes_per_second"]
    size = f"batch {batch}, context {seen:.0f}{', weights in fp8' if fp8 else ''}"
    line = {
        "name": "decode step",
        "size": size,
        "ours": moved / step / 1e9,
        "baseline": copied / 1e9,
        "baseline_name": "copy",
        "ratio": moved / step / copied,
        "unit": "GB/s",
    }
    note(f"decode, {size}: {1e3 * step:.3f} ms a step, {batch / step:,.0f} tokens/s")
    few = requests_of(c, batch, 1, prompt, context.either(32, 2))
    profile = traced(lambda: engine.generate(few, SamplingSettings(), 1), context.device)
    return {
        "rows": [gated(line, GATES.get(batch, 0.0), batch in GATES and not fp8)],
        "milliseconds_a_step": 1e3 * step,
        "tokens_per_second": batch / step,
        "seconds": seconds,
        "profile": profile.tell(
            f"batch {batch}, its prefill and {few[0].max_new_tokens} tokens", attends=True
        ),
    }


def prefill(context: Context) -> Result:
    """One new token a prompt, by the limit of tokens a pass; at the engine's own limit too, and
    there with more new tokens as well."""
    c = model_of(context)
    stage, length = stage_of(context, c), context.either(384, 16)
    limits = context.either((8192, 16_384, 32_768), (16, 64))
    found: Result = {"rows": [], "seconds": {}}
    peak = peak_bf16(context.device)
    for prompts in context.either((64, 256), (2, 4)):
        requests = requests_of(c, prompts, 1, length, 1)
        flop = prompts * length * c.flops_per_token(length) / 3
        for limit in (None, *limits):
            options = {} if limit is None else {"prefill_tokens": limit}
            engine = Engine([stage], slots=prompts, longest=length + 16, **options)
            seconds = timed(engine, requests, context, 2)
            name = f"{prompts} prompts of {length}, {limit or 'the default'} tokens a pass"
            found["seconds"][name] = seconds
            note(f"prefill, {name}: {1e3 * seconds:.1f} ms, MFU {flop / seconds / peak:.3f}")
            if limit is None:
                line = {"name": "prefill, MFU", "size": name, "ours": flop / seconds / 1e12}
                line |= {"baseline": peak / 1e12, "baseline_name": "the bf16 peak"}
                line |= {"ratio": flop / seconds / peak, "unit": "TFLOP/s"}
                found["rows"].append(gated(line, 0.5))
                again = functools.partial(engine.generate, requests, SamplingSettings(), 3)
                profile = traced(again, context.device)
                found[f"profile, {prompts} prompts"] = profile.tell(
                    f"prefill, {name}", top=20, attends=True
                )
                more = requests_of(c, prompts, 1, length, context.either(16, 2))
                seconds = timed(engine, more, context, 2)
                found["seconds"][f"{name}, and {more[0].max_new_tokens} new tokens"] = seconds
                note(f"{prompts} prompts and {more[0].max_new_tokens} new tokens: {seconds:.3f} s")
            del engine
    return found


def groups(context: Context) -> Result:
    """512 new tokens for groups of 8 and 64: the prompt of a group is computed once."""
    c = model_of(context)
    prompt, new, samples = context.either((256, 512, 256), (16, 4, 8))
    stage = stage_of(context, c)
    engine = Engine([stage], slots=samples, longest=prompt + new)
    found: Result = {"rows": [], "tokens_per_second": {}}
    for group in context.either((8, 64), (2, 4)):
        requests = requests_of(c, samples // group, group, prompt, new)
        seconds = timed(engine, requests, context, 2)
        name, rate = f"{samples // group} groups of {group}", samples * new / seconds
        found["tokens_per_second"][name] = rate
        note(f"generation, {name}, {new} new tokens: {rate:,.0f} tokens/s")
    return found


def growth(context: Context) -> Result:
    """A decode step against the batch."""
    c = model_of(context)
    prompt, (short, long) = context.either((128, (16, 80)), (8, (2, 4)))
    batches = context.either([1, 16, 64, 128, 256, 512], [1, 2])
    stage = stage_of(context, c)
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
    found = {"x": xs, "ms": ts, "fit": fitted(xs, ts)}
    note(f"decode step against the batch: {found}")
    return {"rows": [], "batch": found}


def grpo(context: Context) -> Result:
    """A whole step: what generation and training take, and what of that neither arithmetic nor
    bandwidth asks for; then a step of fewer tokens under the profiler."""
    prompts, samples, new = context.either((16, 16, 512), (2, 2, 4))
    c, device = model_of(context), context.device
    case = Case(c, prompts, samples, new)
    step, objective = our_step(case, device=device, dtype=dtype_on(context))
    machine = speeds(context)
    step()
    whole: list[float] = []
    parts: dict[str, list[float]] = {}
    for _ in range(context.either(3, 2)):
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        whole.append(time.perf_counter() - begun)
        for name, seconds in spent(objective).items():
            parts.setdefault(name, []).append(seconds)
    median = statistics.median(whole)
    split = {name: statistics.median(values) for name, values in parts.items()}
    split["log-probs, training, optimizer"] = median - sum(split.values())
    length = PROMPT_TOKENS + new
    trained = c.flops_per_token(length) * prompts * samples * length
    width = dtype_on(context).itemsize
    moved = new * bytes_of_a_step(c, prompts * samples, PROMPT_TOKENS + new / 2, width)
    floors = {
        "generate": moved / machine["copy_bytes_per_second"],
        "log-probs, training, optimizer": trained / machine["product_flop_per_second"],
    }
    floor, gap = sum(floors.values()), objective.metrics().get("rl/logprob_gap")
    size = f"{prompts}×{samples}×{new} tokens"
    line = {"name": "GRPO step", "size": size, "ours": median, "baseline": floor, "unit": "s"}
    line |= {"baseline_name": "arithmetic and bandwidth", "ratio": floor / median}
    for what, times in (("takes", split), ("floor", floors)):
        note(f"GRPO step, {what}: " + ", ".join(f"{k} {v:.3f} s" for k, v in times.items()))
    note(f"GRPO step, gap of log-probs between rollout and training: {gap}")
    result: Result = {
        "rows": [gated(line, 0.65)],
        "case": {k: v for k, v in dataclasses.asdict(case).items() if k != "model"},
        "step_seconds": median,
        "split_seconds": split,
        "floor_seconds": floors,
        "logprob_gap": gap,
    }
    del step, objective
    freed(context)
    few = Case(c, prompts, samples, context.either(64, 2))
    try:
        step, _ = our_step(few, device=device, dtype=dtype_on(context))
        step()
        profile = traced(step, device)
    except torch.OutOfMemoryError as error:
        note(f"no profile of a GRPO step: {error}"[:200])
        return result
    label = f"a GRPO step of {few.new_tokens} new tokens"
    return {**result, "profile": profile.tell(label, attends=True)}


PIECES = [
    *(Piece(f"decode-{batch}", 7, functools.partial(decode, batch=batch)) for batch in (1, 8, 32)),
    Piece("decode-256", 17, functools.partial(decode, batch=256)),
    Piece("decode-1-fp8", 6, functools.partial(decode, batch=1, fp8=True)),
    Piece("decode-256-fp8", 15, functools.partial(decode, batch=256, fp8=True)),
    Piece("prefill", 20, prefill),
    Piece("grpo", 35, grpo),
    Piece("groups", 30, groups),
    Piece("decode-growth", 40, growth),
]
