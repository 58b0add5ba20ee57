"""Timing on a device by its own events, and the speeds that times are compared with."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from gpu.pieces import Context

# A function is called with a counter, by which it goes through sets of inputs: together they are
# larger than the L2 cache, so that none of them is still in it.
Call = Callable[[int], object]
L2_BYTES = 256 << 20
AHEAD_CYCLES = 8_000_000  # about 4 ms on the device, in which Python queues what is timed
WANTED_SECONDS = 2e-3


def sets_for(bytes_each: int, small: bool) -> int:
    return 2 if small else min(64, max(2, math.ceil(L2_BYTES / bytes_each)))


def interleaved(
    functions: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 9,
    budget_seconds: float = 10.0,
) -> dict[str, float]:
    """Median seconds of one call of each, in turn, after a warm-up."""
    once = _on_cuda if device.type == "cuda" else _on_cpu
    counts: dict[str, int] = {}
    for name, function in functions.items():
        function(0)
        function(1)
        spent = min(once(function, 2, 1), once(function, 3, 1))
        counts[name] = min(50, max(1, math.ceil(WANTED_SECONDS / max(spent, 1e-7))))
        if device.type == "cpu":
            counts[name] = 1
    taken: dict[str, list[float]] = {name: [] for name in functions}
    begun = time.perf_counter()
    for number in range(rounds):
        for name, function in functions.items():
            taken[name].append(once(function, number * counts[name], counts[name]))
        if number >= 2 and time.perf_counter() - begun > budget_seconds:
            break
    return {name: statistics.median(values) for name, values in taken.items()}


def _on_cuda(function: Call, first: int, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD_CYCLES)
    start.record()
    for number in range(first, first + count):
        function(number)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


def _on_cpu(function: Call, first: int, count: int) -> float:
    begun = time.perf_counter()
    for number in range(first, first + count):
        function(number)
    return (time.perf_counter() - begun) / count


def copies(device: torch.device, small: bool) -> tuple[Call, int]:
    """A copy, and the bytes it reads and writes."""
    source = torch.randn((1 << 16) if small else (1 << 28), device=device)
    target = torch.empty_like(source)
    return lambda _: target.copy_(source), 2 * source.nbytes


def products(device: torch.device, small: bool) -> tuple[Call, int]:
    """A square matrix product in the precision of training, and its operations."""
    size = 128 if small else 8192
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out), 2 * size**3


def speeds(context: Context) -> dict[str, float]:
    """Bytes and operations a second, measured once a call."""
    found: dict[str, float] | None = context.kept("speeds")
    if found is None:
        copy, moved = copies(context.device, context.small)
        product, operations = products(context.device, context.small)
        seconds = interleaved({"copy": copy, "product": product}, context.device)
        found = {
            "copy_bytes_per_second": moved / seconds["copy"],
            "product_flop_per_second": operations / seconds["product"],
        }
        context.keep("speeds", found)
    return found


def fitted(xs: list[float], ts: list[float]) -> dict[str, float]:
    """t = a + b·x by least squares, and the largest miss beside the mean of t."""
    x = torch.tensor(xs, dtype=torch.float64)
    t = torch.tensor(ts, dtype=torch.float64)
    design = torch.stack((torch.ones_like(x), x), dim=1)
    solution = torch.linalg.lstsq(design, t[:, None]).solution[:, 0]
    miss = (t - design @ solution).abs().max() / t.mean()
    return {"a": float(solution[0]), "b": float(solution[1]), "largest_miss": float(miss)}
