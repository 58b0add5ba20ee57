"""What the data sheets say of a GPU and of the links between GPUs, and the share of it reached.

Shares were measured on one H200, in steps and decoding of 1.5e9 parameters, and are taken for the
other cards too (benchmarks/results/card.md); a copy reached 3.0 of 3.35 TB/s on one H100 besides.
`LINKS`, the latencies of collectives and `MEMORY` are assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Arithmetic = Literal["bf16", "fp8", "tf32", "fp32", "fp64"]

PRODUCTS = 0.73  # of the peak: the matrix products of a step; 8192³ alone 0.80 to 0.82
FP8_PRODUCTS = 0.55  # of fp8's peak, with the casts into it and the scales
COPY = 0.90  # of the memory's bandwidth: passes over activations, weights read to decode
CACHE = 0.62  # of it: keys and values read to decode, through pages that samples may share
ATTENTION = 0.38  # of the peak: causal attention forward and backward, with what prepares it
DECODE_KERNELS_OF_LAYER = 9  # launches of a layer's decode step
DECODE_KERNEL = 4.8e-6  # seconds that each takes beside what it must read
LINKS = 0.80  # of a link's bandwidth
LATENCY_IN_NODE = 10e-6  # seconds of a collective of any size
LATENCY_BETWEEN_NODES = 25e-6
MEMORY = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers, fragmentation


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers: per second, and per direction where a link has two."""

    name: str
    rates: Mapping[Arithmetic, float]  # operations of dense matrix products
    memory_bytes: float
    memory_bandwidth: float
    node_bandwidth: float  # NVLink, of one GPU
    network_bandwidth: float  # of one GPU's network card
    gpus_per_node: int = 8

    @property
    def flops(self) -> float:
        """What MFU is measured against, whatever a run computes in."""
        return self.rates["bf16"]

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * MEMORY

    def rate(self, arithmetic: Arithmetic) -> float:
        if arithmetic not in self.rates:
            raise ValueError(
                f"--gpu is '{self.name}', which has no {arithmetic}; it has {', '.join(self.rates)}"
            )
        return self.rates[arithmetic]

    def product_seconds(
        self, rows: int, inner: int, columns: int, element_bytes: int, kind: Arithmetic
    ) -> float:
        """[rows, inner] x [inner, columns]: arithmetic, or reading and writing if that is more."""
        share = FP8_PRODUCTS if kind == "fp8" else PRODUCTS
        arithmetic = 2 * rows * inner * columns / (self.rate(kind) * share)
        moved = (rows * inner + inner * columns + rows * columns) * element_bytes
        return max(arithmetic, self.pass_seconds(moved))

    def pass_seconds(self, moved_bytes: float) -> float:
        return moved_bytes / (self.memory_bandwidth * COPY)

    def cache_seconds(self, read_bytes: float) -> float:
        return read_bytes / (self.memory_bandwidth * CACHE)

    def attention_seconds(self, flops: float, kind: Arithmetic) -> float:
        return flops / (self.rate(kind) * ATTENTION)

    def in_node(self, stride: int, size: int) -> bool:
        """Whether `size` ranks, each `stride` after the one before, sit on one node."""
        return stride * size <= self.gpus_per_node

    def link_bandwidth(self, stride: int, size: int) -> float:
        """Of a ring over such a group: between nodes, its members on a node share their cards."""
        if self.in_node(stride, size):
            return self.node_bandwidth * LINKS
        together = max(1, self.gpus_per_node // stride)
        return min(self.node_bandwidth, self.network_bandwidth * together) * LINKS

    def latency(self, stride: int, size: int) -> float:
        return LATENCY_IN_NODE if self.in_node(stride, size) else LATENCY_BETWEEN_NODES


AMPERE: Mapping[Arithmetic, float] = {
    "bf16": 312e12,
    "tf32": 156e12,
    "fp32": 19.5e12,
    "fp64": 19.5e12,
}
HOPPER: Mapping[Arithmetic, float] = {
    "bf16": 989e12,
    "fp8": 1979e12,
    "tf32": 495e12,
    "fp32": 67e12,
    "fp64": 67e12,
}
BLACKWELL: Mapping[Arithmetic, float] = {
    "bf16": 2250e12,
    "fp8": 4500e12,
    "tf32": 1125e12,
    "fp32": 75e12,
    "fp64": 37e12,
}
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", AMPERE, 80e9, 2.04e12, 300e9, 25e9),
        Gpu("h100", HOPPER, 80e9, 3.35e12, 450e9, 50e9),
        Gpu("h200", HOPPER, 141e9, 4.8e12, 450e9, 50e9),
        Gpu("b200", BLACKWELL, 180e9, 7.7e12, 900e9, 50e9),
    )
}


def gpu_named(device: str) -> Gpu | None:
    """By the name that CUDA gives a device: "NVIDIA H100 80GB HBM3"."""
    words = device.lower().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
