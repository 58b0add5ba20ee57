"""Products in fp32 of a linear layer, forward and both of backward, against torch's.

Letters: T tokens, d columns of the input, o columns of the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Row, interleaved_seconds, row
from torch import Tensor

from megarlx.ops import native

native.load()
TOKENS = 2048
# d, o: the projections of the training benchmark's 0.2M, 2M and 10M, a head, and few tokens
LAYERS = ((64, 192), (64, 320), (160, 64), (64, 330), (192, 1024), (512, 192), (320, 1728))
FEW = (16, 64)


def both(a: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    ours, theirs = a.new_empty(len(a), b.shape[1]), a.new_empty(len(a), b.shape[1])
    return {
        "ours": lambda: torch.ops.megarlx.product_(ours, a, b, False),
        "torch": lambda: torch.mm(a, b, out=theirs),
    }


def rows() -> list[Row]:
    found: list[Row] = []
    for tokens, (d, o) in [*((TOKENS, layer) for layer in LAYERS), *((t, (192, 576)) for t in FEW)]:
        x, weight, upstream = torch.randn(tokens, d), torch.randn(o, d), torch.randn(tokens, o)
        for name, a, b in (
            ("forward", x, weight.t()),
            ("by the input", upstream, weight),
            ("by the weight", upstream.t(), x),
        ):
            seconds = interleaved_seconds(both(a, b), pairs=51, budget_seconds=2.0)
            rate = {who: 2 * tokens * d * o / each / 1e9 for who, each in seconds.items()}
            size = f"T={tokens} d={d} o={o}"
            found.append(
                row(f"product_, {name}", size, rate["ours"], rate["torch"], "torch mm", "GFLOP/s")
            )
    return found
