"""Every CUDA kernel once on a small case, for a smoke test and under compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/gpu/kernels_once.py

Sizes that are no multiple of anything, aligned and not, so that the edges are touched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megarlx.comm.groups import Group
from megarlx.ops import sample
from megarlx.ops.averaging import adamw_update_, average_adamw_, replica_average_
from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.token_loss import token_loss

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
    {"top_k": 600},
    {"top_p": 0.8},
]


def once_sampling(device: torch.device) -> None:
    for size, dtype in ((1003, torch.bfloat16), (1024, torch.float32), (4224, torch.bfloat16)):
        logits = torch.randn(5, size, device=device).to(dtype)
        keys = torch.stack([torch.arange(5), torch.arange(5)], 1).to(device)
        for options in FILTERS:
            drawn = sample(logits, seed=1, keys=keys, **options)
            assert bool(((drawn.token >= 0) & (drawn.token < size)).all())
    shard = torch.randn(5, 512, device=device)
    seed, heat = torch.tensor([1], device=device), torch.ones(1, device=device)
    partials = [
        torch.ops.megarlx.sample_partials(shard, seed, keys, heat, first, 900) for first in (0, 512)
    ]
    torch.ops.megarlx.sample_combine(torch.stack(partials), heat)


def once_token_loss(device: torch.device) -> None:
    precisions = [torch.float32, torch.float64, torch.bfloat16]
    for size in (7, 1030, 60_001):  # the last: more of a row than shared memory holds in fp32
        for dtype in precisions:
            logits = torch.randn(5, size, device=device).to(dtype).requires_grad_()
            targets = torch.randint(0, size, (5,), device=device)
            mask = torch.tensor([True, False, True, True, True], device=device)
            token_loss(logits, targets, LossSpec(), normalizer=4, mask=mask).loss.backward()
            assert logits.grad is not None
            assert bool(logits.grad.isfinite().all())


def once_linear_token_loss(device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(70, 64, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(1030, 64, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 1000, (70,), device=device)
    buffer = torch.zeros(1030, 64, device=device)
    for into in (None, buffer):
        linear_token_loss(
            hidden,
            weight,
            targets,
            LossSpec(),
            normalizer=70,
            vocab_size=1000,
            rows_per_chunk=32,
            weight_grad_=into,
        ).loss.backward()


def once_averaging(device: torch.device) -> None:
    for count, shift in ((10_007, 0), (10_007, 3), (140_001, 0)):

        def buffer(count: int = count, shift: int = shift) -> Tensor:
            return torch.rand(count + shift, device=device)[shift:]

        for n in (1, 2, 3):
            average_adamw_(
                buffer(),
                [buffer() for _ in range(n)],
                [buffer() for _ in range(n)],
                [buffer() for _ in range(n)],
                lrs=1e-3,
                steps=torch.zeros(n, dtype=torch.int64, device=device),
                weights=1 / n,
                param_out=torch.empty(count, device=device, dtype=torch.bfloat16),
            )
        target, moments = buffer(), (buffer(), buffer())
        steps = torch.zeros(1, dtype=torch.int64, device=device)
        delta = adamw_update_(target, buffer(), *moments, lr=1e-3, steps=steps)
        out = torch.empty(count, device=device, dtype=torch.bfloat16)
        for wire in (torch.float32, torch.bfloat16):
            replica_average_(
                target, delta, weight=0.5, group=Group.alone("replica"), wire=wire, param_out=out
            )
        assert bool(out.isfinite().all())


ONCE = {
    "sample": once_sampling,
    "token_loss": once_token_loss,
    "linear_token_loss": once_linear_token_loss,
    "averaging": once_averaging,
}


def run_all(device: torch.device) -> list[str]:
    for once in ONCE.values():
        once(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return list(ONCE)


if __name__ == "__main__":
    print("ran", ", ".join(run_all(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))))
