"""Products of few rows, by the bytes of the matrix: against torch's product and a copy.

A matrix is taken from a set that no cache holds, another in each round.

Letters: R rows, K columns, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import Row, interleaved_seconds, row

from megarlx.generation.decoders.fp8 import Fp8Rows
from megarlx.ops.narrow_product import narrow_product_

BEYOND_CACHES = 256 << 20  # bytes


@dataclass
class Problem:
    rows: int
    columns: int
    outputs: int
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    beyond: int = BEYOND_CACHES

    def __post_init__(self) -> None:
        each = self.columns * self.outputs * self.dtype.itemsize
        shape = (1 + self.beyond // each, self.outputs, self.columns)
        made = {"dtype": self.dtype, "device": self.device}
        self.weights = torch.randn(shape, device=self.device).to(self.dtype)
        self.x = torch.randn(self.rows, self.columns, **made)
        self.out = torch.empty(self.rows, self.outputs, **made)
        self.narrow: list[Fp8Rows] = []

    def weight(self, number: int) -> torch.Tensor:
        return self.weights[number % len(self.weights)]

    def ours(self, number: int) -> None:
        narrow_product_(self.x, self.weight(number), self.out)

    def fp8(self, number: int) -> None:
        if not self.narrow:
            self.narrow = [Fp8Rows.like(weight).take_(weight) for weight in self.weights]
        held = self.narrow[number % len(self.narrow)]
        narrow_product_(self.x, held.values, self.out, scales=held.scales)

    def torchs(self, number: int) -> None:
        torch.mm(self.x, self.weight(number).t(), out=self.out)

    @property
    def bytes(self) -> int:
        return self.weight(0).numel() * self.dtype.itemsize


def rows() -> list[Row]:
    found: list[Row] = []
    for few in (1, 8, 16):
        problem = Problem(few, 2048, 8192, torch.float32)
        source = torch.randn(1 << 24)
        target = torch.empty_like(source)
        counted = {"ours": 0, "torch": 0}

        def next_of(
            name: str, call: Callable[[int], None], counted: dict[str, int] = counted
        ) -> Callable[[], object]:
            def run() -> None:
                counted[name] += 1
                call(counted[name])

            return run

        seconds = interleaved_seconds(
            {
                "ours": next_of("ours", problem.ours),
                "torch": next_of("torch", problem.torchs),
                "copy": lambda: target.copy_(source),  # noqa: B023
            }
        )
        size = f"R={few} K=2048 N=8192"
        spent = 1e3 * seconds["ours"]
        moved = problem.bytes / seconds["ours"] / 1e9
        copied = 2 * 4 * len(source) / seconds["copy"] / 1e9
        found += [
            row("narrow_product_", size, spent, 1e3 * seconds["torch"], "torch mm", "ms"),
            row("narrow_product_", size, moved, copied, "copy", "GB/s"),
        ]
    return found
