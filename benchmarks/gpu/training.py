"""Stage model, training: the step of configs/olmo2_1b.toml on one GPU, and where its time goes.

The configuration's model, sequence length and micro-batch; fewer micro-batches a step than its 512
sequences, which would take half a minute each, so the optimizer's share is larger than it is there.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from training import SIZES, Size, our_step

from gpu.clock import products
from gpu.pieces import ROOT, Context, Piece, Result, gated, need
from megarlx.config import load_config
from megarlx.planning.hardware import GPUS

PEAK_BF16 = GPUS["h100"].flops  # of the data sheet, without sparsity: what MFU is a share of
MICROBATCHES, WARM_UP, STEPS = 4, 3, 20


def size_of(context: Context, sequences_per_microbatch: int) -> Size:
    if context.small:
        small = SIZES["0.2M"]
        return Size(small.model, MICROBATCHES * sequences_per_microbatch, 32)
    config = load_config(ROOT / "configs" / "olmo2_1b.toml")
    sequences = MICROBATCHES * sequences_per_microbatch
    return Size(config.model, sequences, config.training.sequence_length)


def attempt(
    context: Context, size: Size, at_once: int, options: dict[str, Any]
) -> Callable[[], object] | None:
    """A step that was taken once; nothing, and no memory held, where there was too little."""
    shape = (size.sequences, size.sequence_length + 1)
    samples = torch.randint(size.model.vocab_size, shape)
    try:
        step = our_step(
            size, samples, sequences_per_microbatch=at_once, device=context.device, **options
        )
        step()
    except torch.OutOfMemoryError:
        print(f"{at_once} sequences at once: out of memory", flush=True)
        return None
    return step


def made(
    context: Context, backend: str, fp8: str | None, recompute: str
) -> tuple[Callable[[], object], Size, int]:
    """A step with the largest micro-batch, of the configuration's or less, that there is room for.

    Backward of the first step is the tightest place, so one step is taken to see.
    """
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    options = {
        "dtype": dtype,
        "backend": backend,
        "fp8": fp8,
        "recompute": recompute,
        "attention": attention_of(backend),
    }
    for at_once in context.either((4, 2, 1), (2,)):
        size = size_of(context, at_once)
        step = attempt(context, size, at_once, options)
        if step is not None:
            return step, size, at_once
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError("one sequence at once does not fit either")


def attention_of(backend: str) -> str:
    """With Transformer Engine's layers goes cuDNN's, which it brings."""
    return "cudnn" if backend == "te" else "auto"


def seconds_of(step: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Of each step; the device is waited for between them, as a loop that logs would."""
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return taken


def measured(context: Context, backend: str, fp8: str | None, recompute: str = "none") -> Result:
    if backend == "te":
        need("transformer_engine")
    device = context.device
    step, size, at_once = made(context, backend, fp8, recompute)
    seconds_of(step, device, WARM_UP)
    taken = seconds_of(step, device, context.either(STEPS, 2))
    product, operations = products(device, context.small)
    product(0)
    rates = [operations / s for s in seconds_of(lambda: product(1), device, 5)]
    median = statistics.median(taken)
    flop = size.model.flops_per_token(size.sequence_length) * size.tokens
    label = f"{backend} {fp8 or 'bf16'} attention={attention_of(backend)} recompute={recompute}"
    shape = f"{size.sequences}×{size.sequence_length}, {at_once} at once"
    share = flop / median / PEAK_BF16
    line = {
        "name": f"training step MFU, {label}",
        "size": shape,
        "ours": flop / median / 1e12,
        "baseline": PEAK_BF16 / 1e12,
        "baseline_name": "989 TFLOP/s",
        "ratio": share,
        "unit": "TFLOP/s",
    }
    result: Result = {
        "rows": [gated(line, 0.5, fp8 is None)],
        "tokens_per_second": size.tokens / median,
        "seconds": taken,
        "share_of_measured_product": flop / median / statistics.median(rates),
    }
    if device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def profiled(context: Context, backend: str) -> Result:
    """The kernels of one step by the time they take, and how long the device had none."""
    from torch.profiler import ProfilerActivity, profile

    if backend == "te":
        need("transformer_engine")
    device = context.device
    step, size, _ = made(context, backend, None, "none")
    seconds_of(step, device, 2)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        wall = seconds_of(step, device, 1)[0]
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in trace.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros > 0:
            spent[event.key][0] += micros / 1e6
            spent[event.key][1] += event.count
    busy = sum(seconds for seconds, _ in spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:30]
    for name, (seconds, count) in top:
        print(f"{1e3 * seconds:9.2f} ms {seconds / wall:6.1%} {int(count):6d}  {name[:150]}")
    return {
        "rows": [],
        "tokens": size.tokens,
        "step_seconds": wall,
        "kernel_seconds": busy,
        "without_a_kernel_share": 1 - busy / wall if cuda else None,
        "top": [
            {"name": n[:300], "seconds": s, "share": s / wall, "calls": c} for n, (s, c) in top
        ],
    }


PIECES = [
    Piece("train-torch", 70, functools.partial(measured, backend="torch", fp8=None)),
    Piece("train-te", 70, functools.partial(measured, backend="te", fp8=None)),
    Piece("train-te-fp8-delayed", 70, functools.partial(measured, backend="te", fp8="delayed")),
    Piece("train-te-fp8-current", 70, functools.partial(measured, backend="te", fp8="current")),
    Piece("profile-torch", 50, functools.partial(profiled, backend="torch")),
    Piece("profile-te", 50, functools.partial(profiled, backend="te")),
]
