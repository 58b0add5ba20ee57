"""Token loss: from logits against F.cross_entropy; from hidden states against bare products.

Letters: T tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Row, interleaved_seconds, row, sgemm_flop_per_second
from torch import Tensor

from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.token_loss import token_loss

FROM_LOGITS = ((512, 330), (2048, 330), (512, 50304), (2048, 50304))
FROM_HIDDEN = ((2048, 64, 330), (2048, 256, 8192), (2048, 512, 8192), (1024, 512, 50304))
MEMORY = (2048, 256, 8192)


def backward_of(loss: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], None]:
    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        loss().backward()

    return run


def from_logits(tokens: int, vocabulary: int) -> list[Row]:
    logits = torch.randn(tokens, vocabulary).mul_(2).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    spec = LossSpec()
    compiled = torch.compile(lambda x: F.cross_entropy(x, targets))
    functions: dict[str, Callable[[], object]] = {
        "ours": backward_of(
            lambda: token_loss(logits, targets, spec, normalizer=tokens).loss, logits
        ),
        "F.cross_entropy": backward_of(lambda: F.cross_entropy(logits, targets), logits),
        "torch.compile": backward_of(lambda: compiled(logits), logits),
    }
    seconds = interleaved_seconds(functions, pairs=9, budget_seconds=8)
    ours = seconds.pop("ours") * 1e3
    size = f"T {tokens}, V {vocabulary}"
    return [
        row("token_loss", size, ours, value * 1e3, f"{name} forward+backward", "ms")
        for name, value in seconds.items()
    ]


def from_hidden(tokens: int, hidden_size: int, vocabulary: int) -> list[Row]:
    hidden = torch.randn(tokens, hidden_size).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size).div_(hidden_size**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    spec = LossSpec()
    logits = torch.empty(tokens, vocabulary)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)

    functions: dict[str, Callable[[], object]] = {
        "ours": backward_of(
            lambda: linear_token_loss(hidden, weight, targets, spec, normalizer=tokens).loss,
            hidden,
            weight,
        ),
        "the three bare products": products,
        "F.cross_entropy(hidden @ weight.T)": backward_of(
            lambda: F.cross_entropy(hidden @ weight.t(), targets), hidden, weight
        ),
    }
    seconds = interleaved_seconds(functions, pairs=9, budget_seconds=8)
    ours = seconds.pop("ours")
    size = f"T {tokens}, d {hidden_size}, V {vocabulary}"
    flop = 6 * tokens * hidden_size * vocabulary
    rows = [
        row("linear_token_loss", size, ours * 1e3, value * 1e3, name, "ms")
        for name, value in seconds.items()
    ]
    square = sgemm_flop_per_second() / 1e9
    rate = flop / ours / 1e9
    rows.append(row("linear_token_loss", size, rate, square, "sgemm 1024³", "GFLOP/s"))
    return rows


def peak_megabytes(route: str, tokens: int, hidden_size: int, vocabulary: int) -> float:
    """Resident memory that one forward and backward adds, in a process of its own."""
    command = [sys.executable, __file__, route, str(tokens), str(hidden_size), str(vocabulary)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return float(done.stdout)


def measure_peak(route: str, tokens: int, hidden_size: int, vocabulary: int) -> float:
    def step(count: int, hidden_size: int, vocabulary: int) -> None:
        hidden = torch.randn(count, hidden_size).requires_grad_()
        weight = torch.randn(vocabulary, hidden_size).requires_grad_()
        targets = torch.randint(0, vocabulary, (count,))
        if route == "ours":
            loss = linear_token_loss(hidden, weight, targets, LossSpec(), normalizer=count).loss
        else:
            loss = F.cross_entropy(hidden @ weight.t(), targets)
        loss.backward()

    step(64, 32, 64)  # loads libraries and starts threads
    before = peak_kilobytes()
    step(tokens, hidden_size, vocabulary)
    return (peak_kilobytes() - before) / 1024


def peak_kilobytes() -> int:
    """Of this program alone: getrusage's maximum outlives an exec, and would be the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def rows() -> list[Row]:
    torch.manual_seed(0)
    found: list[Row] = []
    for logits_size in FROM_LOGITS:
        found += from_logits(*logits_size)
    for hidden_size in FROM_HIDDEN:
        found += from_hidden(*hidden_size)
    ours, eager = (peak_megabytes(route, *MEMORY) for route in ("ours", "eager"))
    size = "T {}, d {}, V {}".format(*MEMORY)
    found.append(row("linear_token_loss peak memory", size, ours, eager, "eager route", "MB"))
    return found


if __name__ == "__main__":
    print(measure_peak(sys.argv[1], *map(int, sys.argv[2:])))
