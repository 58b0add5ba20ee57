"""average_adamw_ and the replica average against torch's fused AdamW and against a plain copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Row, interleaved_seconds, row
from torch import Tensor

from megarlx.ops.averaging import adamw_update_, average_adamw_, average_adamw_reference_

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


def pass_bytes(n: int) -> int:
    """Of an element: master read and written, n × (g, m, v read; m, v written), bf16 copy out."""
    return 8 + n * 20 + 2


class Problem:
    """n objectives over `count` parameters, for ours and for torch, with equal numbers."""

    def __init__(
        self,
        n: int,
        count: int,
        *,
        device: torch.device | str = "cpu",
        share_moments: bool = False,
    ) -> None:
        """`share_moments`: torch's optimizers move ours, where there is no room for two sets."""
        self.n, self.count = n, count

        def drawn() -> Tensor:
            return torch.randn(count, device=device)

        self.master = drawn()
        self.grads = [drawn() for _ in range(n)]
        self.exp_avgs = [torch.zeros_like(self.master) for _ in range(n)]
        self.exp_avg_sqs = [torch.zeros_like(self.master) for _ in range(n)]
        self.steps = torch.zeros(n, dtype=torch.int64, device=device)
        self.out = torch.empty_like(self.master, dtype=torch.bfloat16)
        self.numbers = torch.ones(n, dtype=torch.float64, device=device)
        self.snapshots = [self.master, *(torch.empty_like(self.master) for _ in range(n - 1))]
        self.optimizers = []
        for i, (snapshot, grad) in enumerate(zip(self.snapshots, self.grads, strict=True)):
            snapshot.requires_grad_()
            snapshot.grad = grad
            optimizer = torch.optim.AdamW(
                [snapshot], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
            )
            if share_moments:
                optimizer.state[snapshot] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": self.exp_avgs[i],
                    "exp_avg_sq": self.exp_avg_sqs[i],
                }
            self.optimizers.append(optimizer)

    def step_with(self, update: Callable[..., None]) -> None:
        update(
            self.master,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            lrs=LR * self.numbers,
            betas=BETAS,
            eps=EPS,
            weight_decays=DECAY * self.numbers,
            steps=self.steps,
            clips=self.numbers,
            weights=self.numbers / self.n,
            param_out=self.out,
        )

    def ours(self) -> None:
        self.step_with(average_adamw_)

    @torch.no_grad()
    def torch_fused(self) -> None:
        """Snapshots, one fused AdamW an objective (the first in place), combine, cast."""
        for snapshot in self.snapshots[1:]:
            snapshot.copy_(self.master)
        for optimizer in self.optimizers:
            optimizer.step()
        for i, snapshot in enumerate(self.snapshots[1:], start=2):
            self.master.lerp_(snapshot, 1 / i)
        self.out.copy_(self.master)


def copy_of(count: int) -> Callable[[], Tensor]:
    source, target = torch.randn(count), torch.empty(count)
    return lambda: target.copy_(source)


def average_rows(n: int, count: int, compiled: bool) -> list[Row]:
    problem = Problem(n, count)
    functions: dict[str, Callable[[], object]] = {
        "ours": problem.ours,
        "fused": problem.torch_fused,
        "copy": copy_of(count),
    }
    if compiled:
        reference = torch.compile(average_adamw_reference_)
        functions["compile"] = lambda: problem.step_with(reference)
    seconds = interleaved_seconds(functions)
    size = f"n={n} P={count:,}"
    name, ours = f"average_adamw_ n={n}", 1e3 * seconds["ours"]
    rate = pass_bytes(n) * count / seconds["ours"] / 1e9
    copy_rate = 8 * count / seconds["copy"] / 1e9
    combined = f"snapshot + {n} torch fused AdamW + combine"
    fused_name = "torch fused AdamW + cast" if n == 1 else combined
    found = [
        row(name, size, ours, 1e3 * seconds["fused"], fused_name, "ms"),
        row(name, size, rate, copy_rate, "copy", "GB/s"),
    ]
    if compiled:
        found.append(row(name, size, ours, 1e3 * seconds["compile"], "torch.compile", "ms"))
    return found


def replica_rows(count: int) -> list[Row]:
    pack, apply = torch.ops.megarlx.replica_average_pack, torch.ops.megarlx.replica_average_apply_
    delta, master = torch.randn(count), torch.randn(count)
    out, half = torch.empty(count, dtype=torch.bfloat16), torch.full((1,), 0.5, dtype=torch.float64)
    wire, update = torch.empty(count), torch.empty(count)
    problem = Problem(1, count)

    def torch_pack() -> None:
        torch.mul(delta, 0.5, out=wire)
        norm = torch.linalg.vector_norm(delta)
        torch.isfinite(norm)

    def torch_apply() -> None:
        master.add_(wire)
        out.copy_(master)

    def local_update() -> None:
        adamw_update_(
            problem.master,
            problem.grads[0],
            problem.exp_avgs[0],
            problem.exp_avg_sqs[0],
            lr=LR,
            steps=problem.steps,
            delta=update,
        )

    seconds = interleaved_seconds(
        {
            "pack": lambda: pack(delta, half, None, wire),
            "torch_pack": torch_pack,
            "apply": lambda: apply(master, wire, True, out),
            "torch_apply": torch_apply,
            "update": local_update,
            "copy": copy_of(count),
        }
    )
    size = f"P={count:,}"
    copy_rate = 8 * count / seconds["copy"] / 1e9

    def rate(name: str, bytes_an_element: int) -> float:
        return bytes_an_element * count / seconds[name] / 1e9

    return [
        row("replica_average pack", size, 1e3 * seconds["pack"], 1e3 * seconds["torch_pack"],
            "torch mul, norm, isfinite", "ms"),
        row("replica_average pack", size, rate("pack", 8), copy_rate, "copy", "GB/s"),
        row("replica_average apply", size, 1e3 * seconds["apply"], 1e3 * seconds["torch_apply"],
            "torch add_, copy_ to bf16", "ms"),
        row("replica_average apply", size, rate("apply", 14), copy_rate, "copy", "GB/s"),
        row("adamw_update_", size, rate("update", 28), copy_rate, "copy", "GB/s"),
    ]  # fmt: skip


def rows() -> list[Row]:
    found: list[Row] = []
    for n in (1, 2, 3):
        found += average_rows(n, 12_000_000, compiled=n == 2)
    return found + replica_rows(24_000_000)
