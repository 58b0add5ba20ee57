"""Policy losses over vocabulary shards, and in pipelines whose backward is split, in fp64.

Letters: T tokens, d hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.config.model import family_config
from megarlx.config.policy import PRESETS, PolicyConfig
from megarlx.model.build import build_model
from megarlx.objectives.losses import loss_spec
from megarlx.ops import Head, LossInputs, LossSpec, TokenLoss, linear_token_loss
from megarlx.ops.policy_loss import PolicyLoss, reinforce
from megarlx.parallel.microbatches import Microbatch
from megarlx.parallel.pipeline_step import PipelineStep

TOKENS, SIZE, VOCABULARY = 26, 6, 41


def config_of(name: str) -> PolicyConfig:
    given = {"sapo": {"loss": "sapo"}, "masked": {"sequence_mask": 0.05}}
    return PolicyConfig(**given.get(name, {"preset": name}), entropy_coefficient=0.1)


def case() -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(TOKENS, SIZE), normal(VOCABULARY, SIZE)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    lp = (hidden @ weight.t()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    inputs = {
        "mask": torch.rand(TOKENS, generator=generator) > 0.2,
        "advantages": normal(TOKENS),
        "old_logprobs": lp + 0.3 * normal(TOKENS),
        "ref_logprobs": lp + 0.3 * normal(TOKENS),
        "rollout_logprobs": lp + 0.3 * normal(TOKENS),
        "sequence": torch.arange(TOKENS) // 6,
        "sequences": 5,
    }
    return hidden, F.pad(weight, (0, 0, 0, 7)), targets, inputs


def trained(size: int, name: str, rows: int, drop: bool) -> dict[str, Tensor]:
    group = Mesh.build(tp=size).tp
    hidden, weight, targets, inputs = case()
    mine = weight.chunk(size)[group.rank].clone().requires_grad_()
    hidden.requires_grad_()
    result = linear_token_loss(
        hidden, mine, targets, loss_spec(config_of(name)), normalizer=4.0, vocab_size=VOCABULARY,
        group=group, rows_per_chunk=rows, drop_masked=drop, **inputs,
    )  # fmt: skip
    result.loss.backward()
    return {
        "loss": result.loss.detach(),
        "metrics": result.metrics,
        "logprobs": result.logprobs,
        "hidden": hidden.grad,
        "weight": mine.grad,
    }


@pytest.mark.parametrize("name", [*PRESETS, "sapo", "masked"])
def test_presets_equal_the_op(run, name: str) -> None:
    """With advantages that differ inside a sequence; one process is held against the op itself in
    tests/unit/objectives/test_losses.py."""
    (alone,) = run(1, trained, 1, name, 1000, True)
    for rows, drop in ((1000, True), (7, False)):
        ranks = run(2, trained, 2, name, rows, drop)
        for rank in ranks:
            for key in ("loss", "metrics", "logprobs", "hidden"):
                torch.testing.assert_close(rank[key], alone[key], rtol=1e-11, atol=1e-13)
            assert torch.equal(rank["loss"], ranks[0]["loss"])
        weight = torch.cat([rank["weight"] for rank in ranks])
        torch.testing.assert_close(weight, alone["weight"], rtol=1e-11, atol=1e-13)


def calls_of_a_loss(schedule: str) -> tuple[list[bool], Tensor]:
    """(for each call whether a backward was running, the gradients)"""
    mesh = Mesh.build(pp=2)
    shape = family_config(
        "olmo2", vocab_size=VOCABULARY, hidden_size=24, layers=4, heads=2, intermediate_size=40
    )
    stages = 2 if schedule == "zbv" else 1
    model = build_model(
        shape, mesh, seed=1, dtype=torch.float64, schedule=schedule, virtual_stages=stages
    )
    backwards: list[int] = [0]
    calls: list[bool] = []
    plain = PipelineStep._backward

    def watched(step: PipelineStep, *place: int) -> None:
        backwards[0] += 1
        plain(step, *place)
        backwards[0] -= 1

    def counted(t: Any, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
        calls.append(backwards[0] > 0)
        found: Tensor = reinforce(t, logprob, entropy, c)
        return found

    def loss(head: Head, inputs: LossInputs) -> TokenLoss:
        return head.token_loss(inputs, LossSpec(PolicyLoss(counted)), normalizer=3.0)

    generator = torch.Generator().manual_seed(2)
    draws = torch.randint(0, VOCABULARY, (4, 2, 1, 8), generator=generator)
    advantages = torch.randn(4, 1, 8, generator=generator, dtype=torch.float64)
    parts = [
        Microbatch(tokens, LossInputs(targets, advantages=a), torch.tensor([0, 8]))
        for (tokens, targets), a in zip(draws, advantages, strict=True)
    ]
    PipelineStep._backward = watched  # type: ignore[method-assign]
    try:
        shard = torch.zeros(model.data_parallel.layout.shard_size, dtype=torch.float64)
        model.data_parallel.begin(shard)
        model.pipeline.forward_backward(parts, loss, on_gradient_ready=model.data_parallel.ready)
        model.data_parallel.finish()
    finally:
        PipelineStep._backward = plain  # type: ignore[method-assign]
    return calls, shard


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv"])
def test_no_backward_of_a_split_schedule_calls_a_loss(run, schedule: str) -> None:
    ranks = run(2, calls_of_a_loss, schedule)
    assert sorted(len(calls) for calls, _ in ranks) == [0, 4]  # once for each micro-batch
    assert not any(running for calls, _ in ranks for running in calls)
    assert all(shard.isfinite().all() and shard.abs().sum() > 0 for _, shard in ranks)
