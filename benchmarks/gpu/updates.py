"""Updates: averaging AdamW and the halves of the replica average against a copy."""

from __future__ import annotations

import functools

import torch
from op_rows.averaging import BETAS, DECAY, EPS, LR, Problem, pass_bytes
from timing import row

from gpu.clock import Call, copies, interleaved
from gpu.pieces import Context, Piece, Result, gated, need

PARAMETERS = 1_500_000_000
WITH_TWO_STATES = 500_000_000  # where a baseline brings moments of its own beside ours


def average(context: Context, n: int) -> Result:
    """Ours and torch's fused AdamW work on the same moments: two sets do not fit beside it."""
    device, count = context.device, context.either(PARAMETERS, 100_003)
    problem = Problem(n, count, device=device, share_moments=True)
    copy, moved = copies(device, context.small)
    functions: dict[str, Call] = {
        "copy": copy,
        "ours": lambda _: problem.ours(),
        "torch": lambda _: problem.torch_fused(),
    }
    seconds = interleaved(functions, device, rounds=7, budget_seconds=20)
    shape = f"n={n} P={count:,}"
    rate = pass_bytes(n) * count / seconds["ours"] / 1e9
    line = row("average_adamw_", shape, rate, moved / seconds["copy"] / 1e9, "copy", "GB/s")
    name = "torch fused AdamW + cast" if n == 1 else f"snapshot + {n} torch fused AdamW + combine"
    return {
        "rows": [
            gated(line, 0.90, n == 2),
            row("average_adamw_", shape, 1e3 * seconds["ours"], 1e3 * seconds["torch"], name, "ms"),
        ],
        "gradient_bytes": 4,
    }


def against_transformer_engine(context: Context) -> Result:
    need("transformer_engine.pytorch")
    from transformer_engine.pytorch.optimizers import FusedAdam

    device, count = context.device, context.either(WITH_TWO_STATES, 10_007)
    problem = Problem(2, count, device=device, share_moments=True)
    theirs = [
        FusedAdam([snapshot], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, adam_w_mode=True)
        for snapshot in problem.snapshots
    ]

    @torch.no_grad()
    def step(_: int) -> None:
        problem.snapshots[1].copy_(problem.master)
        for optimizer in theirs:
            optimizer.step()
        problem.master.lerp_(problem.snapshots[1], 0.5)
        problem.out.copy_(problem.master)

    functions: dict[str, Call] = {"ours": lambda _: problem.ours(), "theirs": step}
    seconds = interleaved(functions, device, rounds=7)
    name = "snapshot + 2 Transformer Engine FusedAdam + combine"
    ours, other = 1e3 * seconds["ours"], 1e3 * seconds["theirs"]
    return {"rows": [row("average_adamw_", f"n=2 P={count:,}", ours, other, name, "ms")]}


def replica(context: Context) -> Result:
    device, count = context.device, context.either(PARAMETERS, 100_003)
    ops = torch.ops.megarlx
    delta, master = torch.randn(count, device=device), torch.randn(count, device=device)
    out = torch.empty(count, device=device, dtype=torch.bfloat16)
    half = torch.full((1,), 0.5, dtype=torch.float64, device=device)
    wire = torch.empty(count, device=device)
    narrow = torch.empty(count, device=device, dtype=torch.bfloat16)
    copy, moved = copies(device, context.small)

    def torch_pack(_: int) -> None:
        torch.mul(delta, 0.5, out=wire)
        torch.isfinite(torch.linalg.vector_norm(delta))

    def torch_apply(_: int) -> None:
        master.add_(wire)
        out.copy_(master)

    functions: dict[str, Call] = {
        "copy": copy,
        "pack": lambda _: ops.replica_average_pack(delta, half, None, wire),
        "pack to bf16": lambda _: ops.replica_average_pack(delta, half, None, narrow),
        "apply": lambda _: ops.replica_average_apply_(master, wire, True, out),
        "torch mul, norm, isfinite": torch_pack,
        "torch add_, copy_ to bf16": torch_apply,
    }
    seconds = interleaved(functions, device, rounds=7)
    copied, shape = moved / seconds["copy"] / 1e9, f"P={count:,}"
    rows = []
    for name, of_element in (("pack", 8), ("pack to bf16", 6), ("apply", 14)):
        rate = of_element * count / seconds[name] / 1e9
        rows.append(row(f"replica_average {name}", shape, rate, copied, "copy", "GB/s"))
    for name, other in (
        ("pack", "torch mul, norm, isfinite"),
        ("apply", "torch add_, copy_ to bf16"),
    ):
        ours, theirs = 1e3 * seconds[name], 1e3 * seconds[other]
        rows.append(row(f"replica_average {name}", shape, ours, theirs, other, "ms"))
    return {"rows": rows}


PIECES = [
    *(Piece(f"average_adamw-{n}", 4, functools.partial(average, n=n)) for n in (1, 2)),
    Piece("average_adamw-te", 10, against_transformer_engine, needs="Transformer Engine"),
    Piece("replica_average", 2, replica),
]
