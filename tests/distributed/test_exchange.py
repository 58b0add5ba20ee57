"""All ranks get all samples, and train together as one rank would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group, Mesh
from megarlx.config.policy import PolicyConfig
from megarlx.objectives.losses import loss_spec
from megarlx.objectives.packing import Layout as Places
from megarlx.objectives.packing import deal, policy_batch
from megarlx.objectives.policy_loss import policy_fields
from megarlx.rollouts.completions import Completions, select
from megarlx.rollouts.exchange import gather_completions, gather_ragged

LENGTHS = [9, 4, 15, 2, 7, 7, 11]
PARTS = [[0, 1], [2, 3, 4, 5, 6], []]  # of each rank; one has nothing


def completions() -> Completions:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    total = sum(LENGTHS)
    written = torch.rand(total, generator=generator) > 0.3
    written[lengths.cumsum(0) - lengths] = False
    return Completions(
        torch.randint(0, 150_000, (total,), generator=generator),
        lengths,
        written,
        old_logprobs=torch.randn(total, generator=generator),
        rollout_logprobs=torch.randn(total, generator=generator),
        truncated=lengths > 8,
    )


def advantages() -> torch.Tensor:
    return torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(1)).double()


def exchange() -> dict[str, Any]:
    group = Mesh.build(dp=3).dp
    chosen = torch.tensor(PARTS[group.rank], dtype=torch.int64)
    everything = gather_completions(select(completions(), chosen), group)
    all_advantages = gather_ragged(advantages()[chosen], group)
    config = PolicyConfig(preset="grpo", kl="none", kl_coefficient=0.0)
    of_tokens = policy_fields(config, everything, all_advantages, max_completion_tokens=16)
    dealt = deal(everything.lengths.tolist(), tokens_per_microbatch=16, ranks=group.size)
    places = Places.of(everything.lengths, dealt, group.rank)
    batch = policy_batch(everything, of_tokens, places, loss_spec(config))
    each = [part.inputs for part in batch.microbatches]
    weighted = torch.stack([x.advantages * x.token_weights * x.mask for x in each])  # type: ignore[operator]
    return {
        "everything": everything,
        "advantages": all_advantages,
        "normalizer": all_reduce_(batch.weight.clone(), group),
        "weighted": all_reduce_(weighted.sum(), group),
        "microbatches": len(batch.microbatches),
    }


def test_every_rank_has_every_sample_and_the_normaliser_is_global(run: Callable[..., Any]) -> None:
    results = run(3, exchange)
    whole = completions()
    config = PolicyConfig(preset="grpo", kl="none", kl_coefficient=0.0)
    alone = policy_fields(config, whole, advantages(), max_completion_tokens=16)
    weighted = alone.advantages * alone.token_weights * alone.mask
    for result in results:
        for field in fields(Completions):
            ours, theirs = (getattr(c, field.name) for c in (result["everything"], whole))
            assert (ours is None) == (theirs is None), field.name
            assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))
        assert torch.equal(result["advantages"], advantages())
        assert result["normalizer"] == alone.sequence_weights.sum()
        torch.testing.assert_close(result["weighted"], weighted.sum(), rtol=1e-12, atol=1e-12)
    assert len({result["microbatches"] for result in results}) == 1


def test_a_group_of_one_exchanges_nothing() -> None:
    whole = completions()
    assert gather_completions(whole, Group.alone("dp")) is whole
    assert gather_ragged(whole.tokens, Group.alone("dp")) is whole.tokens
