"""replica_average_ over real processes against the n-objective op in one process.

n replicas, each with one objective; P elements of the flat buffers; tensors are fp64 unless said.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.ops.averaging import adamw_update_, average_adamw_, replica_average_

P, STEPS, BETAS, DECAY = 70_001, 3, (0.9, 0.95), 0.1  # more than one chunk of the norm


def start(dtype: torch.dtype) -> Tensor:
    return gradient(99, 0, dtype)


def gradient(objective: int, step: int, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(100 * objective + step)
    return torch.randn(P, generator=rng, dtype=torch.float64).to(dtype)


def lr_of(objective: int) -> float:
    return 1e-2 / (objective + 1)


def local(weights: list[float], dtype: torch.dtype, skipped: int | None = None) -> Tensor:
    """All objectives in one process; `skipped` overflows in the second step."""
    n, master = len(weights), start(dtype)
    moments = [[torch.zeros(P, dtype=dtype) for _ in range(n)] for _ in range(2)]
    steps = torch.zeros(n, dtype=torch.int64)
    for step in range(STEPS):
        average_adamw_(
            master,
            [gradient(i, step, dtype) for i in range(n)],
            *moments,
            lrs=[lr_of(i) for i in range(n)],
            betas=BETAS,
            weight_decays=DECAY,
            steps=steps,
            weights=weights,
            found_inf=torch.tensor([step == 1 and i == skipped for i in range(n)]),
        )
    return master


def replicas(
    weights: list[float],
    dtype: torch.dtype,
    wire: torch.dtype,
    skipped: int | None = None,
    dp: int = 1,
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """This rank's master shard after STEPS steps, its copy, and where the shard lies."""
    mesh = Mesh.build(replica=len(weights), dp=dp)
    objective, size = mesh.replica.rank, -(-P // dp)
    low, high = mesh.dp.rank * size, min(P, (mesh.dp.rank + 1) * size)
    master = start(dtype)[low:high].clone()
    exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
    steps, out = torch.zeros(1, dtype=torch.int64), torch.empty(high - low, dtype=torch.bfloat16)
    for step in range(STEPS):
        overflowed = step == 1 and objective == skipped
        grad = gradient(objective, step, dtype)[low:high]
        found_inf = torch.tensor([overflowed])
        delta = adamw_update_(
            master,
            grad.fill_(float("nan")) if overflowed else grad,
            exp_avg,
            exp_avg_sq,
            lr=lr_of(objective),
            betas=BETAS,
            weight_decay=DECAY,
            steps=steps,
            found_inf=found_inf,
        )
        report = replica_average_(
            master,
            delta,
            weight=weights[objective],
            group=mesh.replica,
            wire=wire,
            found_inf=found_inf,
            param_out=out,
        )
        assert bool(report.found_inf) == overflowed
        assert torch.allclose(report.squared_norm, delta.double().square().sum(), rtol=1e-12)
    return master, out, (low, high)


WEIGHTS = {2: [0.5, 0.5], 3: [0.2, 0.3, 0.5]}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("skipped", [None, 0])
def test_equals_the_local_op_in_fp64(run, n, skipped):
    results = run(n, replicas, WEIGHTS[n], torch.float64, torch.float64, skipped)
    expected = local(WEIGHTS[n], torch.float64, skipped)
    for master, out, _ in results:
        assert torch.allclose(master, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(out, master.bfloat16())
        assert torch.equal(master, results[0][0])


def test_halves_of_two_replicas_are_the_local_op_bit_for_bit_in_fp32(run):
    results = run(2, replicas, WEIGHTS[2], torch.float32, torch.float32)
    for master, _, _ in results:
        assert torch.equal(master, local(WEIGHTS[2], torch.float32))


def test_three_replicas_equal_the_local_op_to_rounding_in_fp32(run):
    results = run(3, replicas, WEIGHTS[3], torch.float32, torch.float32)
    expected = local(WEIGHTS[3], torch.float32)
    for master, _, _ in results:
        assert torch.allclose(master, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(master, results[0][0])


def test_a_bfloat16_wire_keeps_masters_identical_and_updates_close(run):
    results = run(2, replicas, WEIGHTS[2], torch.float32, torch.bfloat16)
    expected, before = local(WEIGHTS[2], torch.float32), start(torch.float32)
    for master, _, _ in results:
        assert torch.equal(master, results[0][0])
        error = (master - expected).norm() / (expected - before).norm()
        assert 1e-5 < error < 1e-2  # really sent in bfloat16, and no worse than that


def test_shards_of_two_replicas_make_the_same_whole(run):
    results = run(4, replicas, WEIGHTS[2], torch.float64, torch.float64, None, 2)
    expected = local(WEIGHTS[2], torch.float64)
    assert {span for _, _, span in results} == {(0, 35_001), (35_001, P)}
    for master, _, (low, high) in results:
        assert torch.allclose(master, expected[low:high], rtol=1e-12, atol=1e-12)


def averaged_gradient(weights: list[float], bad_rank: int | None) -> tuple[Tensor, bool, int]:
    """Gradients over 2 replicas × 2 shards; one element of one shard may overflow."""
    mesh = Mesh.build(replica=2, dp=2)
    grad = gradient(mesh.replica.rank, mesh.dp.rank, torch.float32)
    if mesh.world.rank == bad_rank:
        grad[12_345] = float("inf")
    target = torch.empty_like(grad)
    report = replica_average_(
        target,
        grad,
        weight=weights[mesh.replica.rank],
        group=mesh.replica,
        of="gradients",
        shards=mesh.objective,
    )
    return target, bool(report.found_inf), mesh.dp.rank


def test_gradients_are_averaged_over_the_replicas(run):
    for target, found_inf, shard in run(4, averaged_gradient, [0.25, 0.75], None):
        parts = [gradient(i, shard, torch.float32) for i in range(2)]
        assert torch.allclose(target, 0.25 * parts[0] + 0.75 * parts[1], rtol=1e-6, atol=1e-6)
        assert not found_inf


@pytest.mark.parametrize("bad_rank", range(4))
def test_an_overflow_in_one_shard_leaves_out_its_whole_replica(run, bad_rank):
    results = run(4, averaged_gradient, [0.25, 0.75], bad_rank)
    mesh_of = [(rank // 2, rank % 2) for rank in range(4)]
    bad_replica = mesh_of[bad_rank][0]
    good = 1 - bad_replica
    for (replica, _), (target, found_inf, shard) in zip(mesh_of, results, strict=True):
        expected = [0.25, 0.75][good] * gradient(good, shard, torch.float32)
        assert torch.equal(target, expected)
        assert found_inf == (replica == bad_replica)
