"""What the data sheets say of a GPU and of the links between GPUs, and the share of it reached.

`PRODUCTS` and `COPY` were measured on one H100 (bf16 products at 798 of 989 TFLOP/s, a copy at 3.0
of 3.35 TB/s) and are taken for the others too; the other shares and the latencies are assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PRODUCTS = 0.807  # of the peak: large matrix products
COPY = 0.90  # of the memory's bandwidth: passes over activations, weights read to decode
ATTENTION = 0.50  # of the peak: causal attention forward and backward
LINKS = 0.80  # of a link's bandwidth
LATENCY_IN_NODE = 10e-6  # seconds of a collective of any size
LATENCY_BETWEEN_NODES = 25e-6
MEMORY = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers, fragmentation


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers: per second, and per direction where a link has two."""

    name: str
    flops: float  # bf16, dense
    memory_bytes: float
    memory_bandwidth: float
    node_bandwidth: float  # NVLink, of one GPU
    network_bandwidth: float  # of one GPU's network card
    gpus_per_node: int = 8

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * MEMORY

    def product_seconds(self, rows: int, inner: int, columns: int, element_bytes: int) -> float:
        """[rows, inner] x [inner, columns]: arithmetic, or reading and writing if that is more."""
        arithmetic = 2 * rows * inner * columns / (self.flops * PRODUCTS)
        moved = (rows * inner + inner * columns + rows * columns) * element_bytes
        return max(arithmetic, self.pass_seconds(moved))

    def pass_seconds(self, moved_bytes: float) -> float:
        return moved_bytes / (self.memory_bandwidth * COPY)

    def attention_seconds(self, flops: float) -> float:
        return flops / (self.flops * ATTENTION)

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


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 80e9, 2.04e12, 300e9, 25e9),
        Gpu("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
        Gpu("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
        Gpu("b200", 2250e12, 180e9, 7.7e12, 900e9, 50e9),
    )
}


def gpu_named(device: str) -> Gpu | None:
    """By the name that CUDA gives a device: "NVIDIA H100 80GB HBM3"."""
    words = device.lower().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
