"""The training step of configs/olmo2_1b.toml on one GPU: where its time goes, MFU by its shape.

The configuration's model, sequence length and micro-batch; fewer micro-batches a step than its 512
sequences, which would take half a minute each, so the optimizer's share is larger than it is there.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from training import SIZES, Size, our_step

from gpu.clock import speeds
from gpu.pieces import ROOT, Context, Piece, Result, gated, need, note
from gpu.trace import traced
from megarlx.comm.hardware import GPUS, gpu_named
from megarlx.config import load_config

MICROBATCHES, WARM_UP, STEPS = 4, 2, 5
MFU_GATE, FP8_GATE = 0.57, 1.25
# (sequence length, sequences at once): first against the micro-batch, then against the length.
SHAPES = ((4096, 1), (4096, 2), (4096, 4), (4096, 8), (1024, 16), (2048, 8), (8192, 2), (16_384, 1))

SMALL_LAYERS = (3, 20)  # 25M and 145M parameters


def peak_bf16(device: torch.device) -> float:
    """Operations a second of the data sheet, without sparsity: what MFU is a share of."""
    known = gpu_named(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return (known or GPUS["h100"]).flops


def size_of(context: Context, at_once: int, length: int | None = None) -> Size:
    sequences = MICROBATCHES * at_once
    if context.small:
        return Size(SIZES["0.2M"].model, sequences, 32)
    config = load_config(ROOT / "configs" / "olmo2_1b.toml")
    length = length or config.training.sequence_length
    longest = max(length, config.model.max_sequence_length)
    return Size(config.model.model_copy(update={"max_sequence_length": longest}), sequences, length)


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
        note(f"{at_once} × {size.sequence_length} tokens at once: out of memory")
        return None
    return step


def freed(context: Context) -> None:
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def options_of(
    context: Context, backend: str, fp8: str | None, recompute: str, attention: str | None = None
) -> dict[str, Any]:
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    # With Transformer Engine's layers goes cuDNN's attention, which it brings.
    attention = attention or ("cudnn" if backend == "te" else "auto")
    found = {"dtype": dtype, "backend": backend, "attention": attention}
    return {**found, "fp8": fp8, "recompute": recompute}


def made(context: Context, options: dict[str, Any]) -> tuple[Callable[[], object], Size, int]:
    """A step with the largest micro-batch, of the configuration's or less, that there is room for.

    Backward of the first step is the tightest place, so one step is taken to see.
    """
    for at_once in context.either((4, 2, 1), (2,)):
        size = size_of(context, at_once)
        step = attempt(context, size, at_once, options)
        if step is not None:
            return step, size, at_once
        freed(context)
    raise RuntimeError("one sequence at once does not fit either")


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


def mfu_row(context: Context, name: str, size: Size, at_once: int, seconds: float) -> Result:
    flop = size.model.flops_per_token(size.sequence_length) * size.tokens
    peak = peak_bf16(context.device)
    return {
        "name": name,
        "size": f"{size.sequences}×{size.sequence_length}, {at_once} at once",
        "ours": flop / seconds / 1e12,
        "baseline": peak / 1e12,
        "baseline_name": "the bf16 peak",
        "ratio": flop / seconds / peak,
        "unit": "TFLOP/s",
    }


def measured(
    context: Context,
    backend: str,
    fp8: str | None = None,
    recompute: str = "none",
    attention: str | None = None,
) -> Result:
    if backend == "te" or attention == "cudnn":
        need("transformer_engine.pytorch")  # first: it must load cuDNN before torch does
    device = context.device
    step, size, at_once = made(context, options_of(context, backend, fp8, recompute, attention))
    seconds_of(step, device, WARM_UP)
    taken = seconds_of(step, device, context.either(STEPS, 2))
    median = statistics.median(taken)
    tokens = size.tokens / median
    label = f"training, {backend} layers, {fp8 or context.either('bf16', 'fp32')}"
    label += f", {attention} attention" if attention else ""
    note(f"{label}: {median:.4f} s a step {[round(s, 4) for s in taken]}, {tokens:,.0f} tokens/s")
    rows = [gated(mfu_row(context, f"{label}, MFU", size, at_once, median), MFU_GATE, fp8 is None)]
    result: Result = {"rows": rows, "tokens_per_second": tokens, "seconds": taken}
    if fp8 is None and attention is None:
        context.keep(f"training-{backend}", tokens)
    elif fp8 is not None and (bf16 := context.kept(f"training-{backend}")) is not None:
        line = {"name": f"{label} against bf16", "size": rows[0]["size"], "unit": "tokens/s"}
        line |= {"ours": tokens, "baseline": bf16, "baseline_name": "bf16", "ratio": tokens / bf16}
        rows.append(gated(line, FP8_GATE))
    product = speeds(context)["product_flop_per_second"]
    result["share_of_measured_product"] = rows[0]["ours"] * 1e12 / product
    if device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        note(f"{label}: at most {result['peak_gib']} GiB")
    result["profile"] = traced(step, device).tell(label, attends=True)
    return result


def by_shape(context: Context) -> Result:
    """MFU against the micro-batch and the sequence length, at 4 micro-batches a step."""
    options = options_of(context, "torch", None, "none")
    rows = []
    for length, at_once in context.either(SHAPES, ((32, 1), (32, 2))):
        if context.seconds_left() < context.either(6, 1):
            note(f"cut at {at_once} × {length} tokens: the time was over")
            break
        size = size_of(context, at_once, length)
        step = attempt(context, size, at_once, options)
        if step is not None:
            median = statistics.median(seconds_of(step, context.device, context.either(3, 2)))
            rows.append(mfu_row(context, "training by shape, MFU", size, at_once, median))
            note(f"{at_once} × {length} tokens at once: MFU {rows[-1]['ratio']:.4f}")
        del step
        freed(context)
    return {"rows": rows}


def small_models(context: Context) -> Result:
    """The models of configs/study_h100.toml: a micro-batch as one graph, and launched op by op."""
    options = options_of(context, "torch", None, "none")
    trunk = load_config(ROOT / "configs" / "study_h100_trunk.toml")
    at_once, length = trunk.training.sequences_per_microbatch, trunk.training.sequence_length
    rows = []
    for layers in context.either(SMALL_LAYERS, (1,)):
        model = trunk.model.model_copy(update={"layers": layers})
        size = Size(model, at_once, length)
        if context.small:
            size, at_once = Size(SIZES["0.2M"].model, 2, 32), 2
        seconds: dict[str, float] = {}
        for name, below in (("launched", 0), ("as a graph", 1 << 60)):
            step = attempt(context, size, at_once, {**options, "capture_below_parameters": below})
            if step is None:
                continue
            seconds_of(step, context.device, WARM_UP)
            taken = seconds_of(step, context.device, context.either(20, 2))
            seconds[name] = statistics.median(taken)
            label = f"{model.parameters() / 1e6:.0f}M parameters, {name}"
            traced(step, context.device).tell(f"a step of {label}")
            rows.append(mfu_row(context, f"training, {label}, MFU", size, at_once, seconds[name]))
            note(f"training, {label}: {1e3 * seconds[name]:.3f} ms a step")
            del step
            freed(context)
        if len(seconds) == 2:
            plain, ours = seconds.values()
            line: Result = {"unit": "s"}
            line["name"] = f"training, {model.parameters() / 1e6:.0f}M as a graph"
            line |= {"size": f"{at_once}×{length}", "ours": ours, "baseline": plain}
            rows.append({**line, "baseline_name": "launched", "ratio": plain / ours})
    return {"rows": rows}


ENGINE = "Transformer Engine"
PIECES = [
    Piece("train-torch", 14, functools.partial(measured, backend="torch")),
    Piece(
        "train-torch-cudnn",
        21,
        functools.partial(measured, backend="torch", attention="cudnn"),
        needs=ENGINE,
    ),
    Piece("train-te", 18, functools.partial(measured, backend="te"), needs=ENGINE),
    Piece(
        "train-te-fp8", 22, functools.partial(measured, backend="te", fp8="current"), needs=ENGINE
    ),
    Piece(
        "train-te-fp8-delayed",
        25,
        functools.partial(measured, backend="te", fp8="delayed"),
        needs=ENGINE,
    ),
    Piece("train-by-shape", 45, by_shape),
    Piece("train-small", 8, small_models),
]
