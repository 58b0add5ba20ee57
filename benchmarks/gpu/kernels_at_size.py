"""Each kernel once at the size that it is measured at, for a program that reads its counters.

    ncu -k 'regex:…' python benchmarks/gpu/kernels_at_size.py

Piece `counters` does, with the kernels' names.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "benchmarks")]

from op_rows.averaging import Problem

from gpu.elementwise import cases
from gpu.pieces import Context
from gpu.sampling import Inputs
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.token_loss import token_loss


def run(context: Context) -> None:
    device = context.device
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    Problem(1, context.either(200_000_000, 1003), device=device, share_moments=True).ours()
    sizes = ((8192, 50_304, half), (4096, 100_352, torch.float32))
    for tokens, size, dtype in context.either(sizes, ((16, 330, torch.float32),)):
        logits = torch.randn(tokens, size, device=device).mul_(2).to(dtype).requires_grad_()
        targets = torch.randint(0, size, (tokens,), device=device)
        normalizer = torch.tensor(float(tokens), device=device)
        token_loss(logits, targets, LossSpec(), normalizer=normalizer).loss.backward()
        del logits
    size, batch = context.either((151_936, 256), (330, 16))
    x = Inputs(context, size, batch, 1.0)
    x.ours()(0)
    x.ours(top_p=torch.full((1,), 0.9, device=device))(1)
    for case in cases(context).values():
        case.forward(0)
        case.backward(0)


if __name__ == "__main__":
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    run(Context(device, device.type == "cpu", Path(), math.inf))
    if device.type == "cuda":
        torch.cuda.synchronize()
