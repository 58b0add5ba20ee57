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
from megarlx.ops.decode_parts import StepState, decode_advance_
from megarlx.ops.e4m3 import e4m3_rows_
from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.narrow_product import narrow_product_
from megarlx.ops.normal import normal_slice_
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


def once_elementwise(device: torch.device) -> None:
    ops = torch.ops.megarlx
    narrow = [torch.bfloat16] if device.type == "cuda" else []
    for dtype in (torch.float32, torch.float64, *narrow):
        for width in (37, 192, 8200):  # the last: more of a row than a block's registers hold
            x, weight = (torch.randn(*s, device=device).to(dtype) for s in ((70, width), (width,)))
            y, inverse = ops.rms_norm(x, weight, 1e-5, x)
            for found in ops.rms_norm_backward(y, x, weight, inverse, True):
                assert bool(found.isfinite().all())
            gate_up = torch.cat((x, y), 1)
            ops.swiglu_backward(ops.swiglu(gate_up), gate_up)
        for h, k, dim in ((3, 1, 22), (16, 4, 64), (80, 1, 128)):
            qkv = torch.randn(70, (h + 2 * k) * dim, device=device).to(dtype)
            turn = torch.rand(70, 1, dim // 2, device=device).to(dtype)
            for sizes in ((h * dim, k * dim), (dim, dim)):
                given = (qkv, *(torch.ones(n, device=device).to(dtype) for n in sizes), turn, turn)
                q, keys, inverse = ops._heads(*given, h, k, 1e-5)
                ops._heads_backward(q, keys, keys, *given, inverse, True)
            sums = ops._heads_sums(qkv, h, k)
            ops._heads(qkv, None, None, turn, turn, h, k, 0.0)
            assert bool(sums.isfinite().all())


def once_decode_parts(device: torch.device) -> None:
    ops = torch.ops.megarlx
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, out, inner = drawn(5, 192), drawn(5, 192), drawn(5, 96)
    ops.decode_norm_(x, drawn(5, 192), drawn(192), 1e-5, out)
    ops.decode_norm_(x, out, drawn(192), 1e-5, None)
    ops.decode_swiglu_(x, inner)
    table = torch.tensor(
        [[1, 0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 3, 4, 5]], device=device, dtype=torch.int32
    )
    slots, positions = (torch.tensor(v, device=device) for v in ([0, 1, -1], [0, 23, 0]))
    cache, turn, q = drawn(6, 8, 2, 32), drawn(24, 16), drawn(3, 4, 32)
    given = (drawn(3, 256), cache, cache.clone(), table, slots, positions, turn, turn)
    ops.decode_heads_(*given, None, None, None, 1, 0.0, q)
    lse = torch.rand(3, 4, device=device)
    out, _ = ops.merge_attention(q, lse, q, lse)
    assert bool(out.isfinite().all())
    state = StepState.empty(3, 2, device)
    ends = torch.zeros(1, dtype=torch.int64, device=device)
    decode_advance_(state, slots, lse[:, 0].clone(), lse[:, 1].clone(), ends=ends, idle_slot=1)
    assert state.step.item() == 1


def once_narrow_product(device: torch.device) -> None:
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    for dtype in (half, torch.float32, torch.float64):
        for rows, columns in ((1, 4512), (16, 1027)):
            x = torch.randn(rows, columns, device=device).to(dtype)
            weight = torch.randn(9, columns, device=device).to(dtype)
            out = torch.full((rows, 9), torch.nan, device=device, dtype=dtype)
            narrow_product_(x, weight, out, bias=weight[:, 0].contiguous(), dependent=True)
            assert bool(out.isfinite().all())
            if dtype == half:
                scales = torch.empty(9, device=device)
                narrow = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
                e4m3_rows_(weight, narrow, scales)
                narrow_product_(x, narrow, out, scales=scales)
                assert bool(out.isfinite().all())


def once_normal(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for rows, columns in ((1, 100_003), (37, 131)):
            whole = torch.zeros(rows, columns + 3, device=device, dtype=dtype)
            normal_slice_(whole[:, 2:-1], key=1, first=2**33 + 5, step=1000, std=0.02)
            assert bool((whole[:, 2:-1] != 0).all())
            assert not bool(whole[:, [0, 1, -1]].any())


ONCE = {
    "decode_parts": once_decode_parts,
    "elementwise": once_elementwise,
    "sample": once_sampling,
    "token_loss": once_token_loss,
    "linear_token_loss": once_linear_token_loss,
    "averaging": once_averaging,
    "normal": once_normal,
    "narrow_product": once_narrow_product,
}


def run_all(device: torch.device) -> list[str]:
    for once in ONCE.values():
        once(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return list(ONCE)


if __name__ == "__main__":
    print("ran", ", ".join(run_all(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))))
