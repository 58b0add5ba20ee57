"""What ran on the device: kernels by the time they take, waits, and which attention it was."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.pieces import Result, note

# Names of kernels (on a CPU: of ops) by which an attention is known. The name of a library that is
# installed says nothing: some libraries choose another one without a word.
ATTENTION = (
    (r"cudnn\w*sdpa", "cuDNN"),
    (r"flash_?attn_?cute|FlashAttention(Forward|Backward)Sm", "FlashAttention 4"),
    (r"FlashAttn(Fwd|Bwd)Sm90", "FlashAttention 3"),
    (r"\bflash::flash_", "FlashAttention 2"),
    (r"pytorch_flash::", "FlashAttention 2 in torch's SDPA"),
    (r"fmha_cutlass", "memory-efficient attention in torch's SDPA"),
    (r"megarlx\W.*(attention|attend)", "megarlx"),
    (r"scaled_dot_product_flash_attention_for_cpu", "torch's SDPA for CPUs"),
    (r"scaled_dot_product_attention_math", "torch's SDPA in plain operations"),
)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Trace:
    wall_seconds: float
    kernels: list[tuple[str, float, int]]  # name, seconds, calls; the longest first
    waits: int | None  # calls in which the host waited for the device; None: not recorded

    @property
    def busy_seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self.kernels)

    @property
    def launches(self) -> int:
        return sum(calls for _, _, calls in self.kernels)

    @property
    def attention(self) -> str:
        """The implementations whose kernels ran."""
        return attention_of([name for name, _, _ in self.kernels])

    def tell(self, label: str, top: int = 30, *, attends: bool = False) -> Result:
        """A line for the screen, the kernels for the log, both as a result.

        `attends`: what ran has an attention in it, which is to be named.
        """
        wall, busy = self.wall_seconds, self.busy_seconds
        attention = f"; attention: {self.attention}" if attends else ""
        waits = "" if self.waits is None else f", {self.waits} waits"
        note(
            f"profile of {label}: {1e3 * wall:.1f} ms, of which kernels {1e3 * busy:.1f} ms; "
            f"{self.launches} launches{waits}{attention}"
        )
        for name, seconds, calls in self.kernels[:top]:
            share = seconds / max(busy, 1e-12)
            print(f"{1e3 * seconds:9.3f} ms {share:6.1%} {calls:6d}  {name[:150]}")
        return {
            "wall_seconds": wall,
            "kernel_seconds": busy,
            "launches": self.launches,
            "waits": self.waits,
            "attention": self.attention,
            "top": [{"name": n[:300], "seconds": s, "calls": c} for n, s, c in self.kernels[:top]],
        }


def attention_of(kernels: list[str]) -> str:
    ran = [name for pattern, name in ATTENTION if any(re.search(pattern, k) for k in kernels)]
    return " and ".join(ran) or "none that is known by its kernels"


def traced(call: Callable[[], object], device: torch.device) -> Trace:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        begun = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - begun
    events = found.key_averages()
    kernels = []
    for event in events:
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros > 0:
            kernels.append((event.key, micros / 1e6, event.count))
    recorded = any(event.key.startswith("cuda") for event in events)
    waits = sum(event.count for event in events if event.key in WAITS) if recorded else None
    return Trace(wall, sorted(kernels, key=lambda kernel: -kernel[1]), waits)
