"""Policy optimisation as an objective: rollouts, their minibatches, resume, gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rl_cases import (
    LONGEST_COMPLETION,
    VOCABULARY,
    config,
    model,
    prompts,
    reinforcement,
    trainer_of,
)
from torch import Tensor

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Group
from megarlx.config.policy import PolicyConfig
from megarlx.model.build import ParallelModel
from megarlx.objectives.policy import Reinforcement
from megarlx.rollouts.advantages import sample_advantages
from megarlx.rollouts.rewards.rewards import RewardError
from megarlx.training.trainer import Trainer

GRPO = {"preset": "grpo"}
MOVING: dict[str, Any] = {"steps_per_rollout": 2, "epochs_per_rollout": 2, "policy": GRPO}


def tensors(one: Trainer) -> list[Tensor]:
    optimizer = one.optimizer
    return [*optimizer.shards.shards.values(), optimizer.steps, one.model.data_parallel.weights]


@pytest.mark.parametrize("stop", range(1, 9))
def test_n_plus_n_steps_are_2n_steps_also_inside_of_a_rollout(tmp_path: Path, stop: int) -> None:
    def made(seed: int) -> tuple[Trainer, Reinforcement]:
        one = reinforcement(config(**MOVING), model(seed))
        return trainer_of(one), one

    whole, first = made(3)
    losses, seen = [], []
    saver = Saver(tmp_path, Group.alone("world"))
    for step in range(9):
        if step == stop:
            whole.save(saver, {}, blocking=True)
        losses.append(whole.global_loss(whole.step()[0]))
        seen.append(first.metrics()["rl/entropy"])
    parts, second = made(8)
    parts.resume(tmp_path / f"iter_{stop:08d}")
    for step in range(stop, 9):
        assert parts.global_loss(parts.step()[0]) == losses[step]
        assert second.metrics()["rl/entropy"] == seen[step]
    for a, b in zip(tensors(parts), tensors(whole), strict=True):
        assert torch.equal(a, b)
    assert second.work == first.work
    assert first.rollouts == second.rollouts == 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_every_log_prob(temperature: float) -> None:
    one = reinforcement(config(temperature=temperature), model())
    trainer = trainer_of(one, lr=0.0)
    for _ in range(3):
        trainer.step()
        metrics = one.metrics()
        assert 0 < metrics["rl/logprob_gap_max"] <= 1e-5
        assert metrics["rl/logprob_gap"] <= metrics["rl/logprob_gap_max"]


def test_the_gap_is_seen_when_sampler_and_trainer_do_not_agree() -> None:
    """The sampler filters; what is trained does not."""
    one = reinforcement(config(top_k=3), model())
    trainer_of(one, lr=0.0).step()
    assert one.metrics()["rl/logprob_gap"] > 0.1


# Its gradient, against autograd in fp64 over whole sequences, from the definitions.

POLICIES: dict[str, dict[str, Any]] = {
    "grpo": {"preset": "grpo"},
    "dapo": {
        "clip_high": 0.28,
        "overlong": "penalty",
        "overlong_buffer": 0.5,
    },
    "gspo": {"preset": "gspo"},
    "cispo": {"loss": "cispo", "clip_low": 0.02, "clip_high": 0.03},
}


def token_logprobs(policy: ParallelModel, tokens: Tensor, temperature: float) -> Tensor:
    """[n - 1], of each token but the first."""
    (stage,) = policy.stages
    logits = stage.logits(stage(tokens[None, :-1]))[:, :VOCABULARY].reshape(-1, VOCABULARY)
    logp = F.log_softmax(logits / temperature, -1)
    return logp.gather(1, tokens[1:, None])[:, 0]


def definition(
    name: str,
    policy: ParallelModel,
    groups: list[list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]],
    advantages: list[list[float]],
    temperature: float,
) -> Tensor:
    """The loss of a minibatch: groups of (tokens, written, old, reference log-probs, _)."""
    settings = config(policy=POLICIES[name]).policy
    per_sequence, counts = [], []
    for group, values in zip(groups, advantages, strict=True):
        for (tokens, written, old, ref, _), a in zip(group, values, strict=True):
            said = written[1:]
            now = token_logprobs(policy, tokens, temperature)[said]
            old, ref = old[1:][said], ref[1:][said]
            low, high = 1 - settings.clip_low, 1 + settings.clip_high
            if name == "gspo":
                s = (now - old).mean().detach().exp()
                ratio = s * (now - now.detach()).exp()
            else:
                ratio = (now - old).exp()
            if name == "cispo":
                token = -ratio.detach().clamp(low, high) * a * now
            else:
                token = -torch.minimum(ratio * a, ratio.clamp(low, high) * a)
            if settings.kl == "k3":
                d = ref - now
                token = token + settings.kl_coefficient * (d.exp() - d - 1)
            counts.append(len(token))
            mean = settings.aggregation == "sequence_mean"
            per_sequence.append(token.mean() if mean else token.sum())
    by = len(per_sequence) if settings.aggregation == "sequence_mean" else sum(counts)
    return torch.stack(per_sequence).sum() / by


def reference(
    book: ParallelModel, state: dict[str, Tensor], tokens: Tensor, temperature: float
) -> Tensor:
    """[n], at each token's own place, under these weights."""
    book.stages[0].load_state_dict(state)
    with torch.no_grad():
        return F.pad(token_logprobs(book, tokens, temperature), (1, 0))


def group_advantages(rewards: Tensor) -> list[list[float]]:
    """grpo's, written once more."""
    found = []
    for row in rewards:
        if float(row.max() - row.min()) <= 1e-6:
            found.append([0.0] * len(row))
            continue
        found.append(((row - row.mean()) / (row.std() + 1e-4)).tolist())
    return found


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_gradient_of_both_minibatches_is_that_of_the_definition(
    name: str, temperature: float
) -> None:
    given = config(
        policy=POLICIES[name], steps_per_rollout=2, prompts_per_step=2, temperature=temperature
    )
    one = reinforcement(given, model(dtype=torch.float64))
    trainer = trainer_of(one, lr=3e-3)
    start, book = copy.deepcopy(one.model.stages[0].state_dict()), model(dtype=torch.float64)
    used: list[int] = []
    for step in range(2):
        before = copy.deepcopy(one.model.stages[0].state_dict())
        trainer.step()
        rollout = one.current
        assert rollout is not None
        made = rollout.completions
        rows = one._sequences_of(rollout, step).tolist()
        assert len(rows) == 8
        used += rows
        bounds = made.offsets.tolist()

        sequences = [
            (
                made.tokens[bounds[row] : bounds[row + 1]],
                made.written[bounds[row] : bounds[row + 1]],
                *[reference(book, start, made.tokens[bounds[row] : bounds[row + 1]], temperature)]
                * 2,
                torch.tensor(row),
            )
            for row in rows
        ]
        chosen = rollout.rewards.reshape(-1)[rows].reshape(-1, 4)
        book.stages[0].load_state_dict(before)
        held = book.data_parallel
        held.gradients.zero_()
        groups = [sequences[:4], sequences[4:]]
        loss = definition(name, book, groups, group_advantages(chosen), temperature)
        loss.backward()
        found = one.model.data_parallel.parameters
        for key, parameter in held.parameters.items():
            ours, theirs = found[key].grad, parameter.grad
            assert ours is not None
            assert theirs is not None
            assert theirs.norm() > 1e-9, key
            assert (ours - theirs).norm() / theirs.norm() < 1e-9, (step, key)
    assert sorted(used) == list(range(16))  # each once in an epoch


def test_rloo_takes_the_divergence_of_the_whole_sample_off_its_reward() -> None:
    given = config(policy={"preset": "rloo", "kl_coefficient": 0.3}, temperature=0.8)
    one = reinforcement(given, model(dtype=torch.float64))
    trainer = trainer_of(one, lr=3e-3)
    start, book = copy.deepcopy(one.model.stages[0].state_dict()), model(dtype=torch.float64)
    trainer.step()
    assert one.metrics()["rl/kl"] == 0
    before = copy.deepcopy(one.model.stages[0].state_dict())
    trainer.step()
    assert one.current is not None
    made, rewards = one.current.completions, one.current.rewards
    assert rewards.unique().numel() > 2
    bounds = made.offsets.tolist()
    pairs = list(pairwise(bounds))
    away = []
    for low, high in pairs:
        now, ref = (reference(book, w, made.tokens[low:high], 0.8) for w in (before, start))
        away.append(float((now - ref)[made.written[low:high]].sum()))
    assert max(map(abs, away)) > 1e-3
    left = (rewards.flatten() - 0.3 * torch.tensor(away, dtype=torch.float64)).reshape(-1, 4)
    advantages = [float(row[i] - (row.sum() - row[i]) / 3) for row in left for i in range(len(row))]
    assert one.current.advantages.tolist() == pytest.approx(advantages, abs=1e-9)
    assert one.metrics()["rl/kl"] == pytest.approx(sum(away) / int(made.written.sum()))
    # And nothing of it in the loss.
    book.stages[0].load_state_dict(before)
    held = book.data_parallel
    held.gradients.zero_()
    loss = torch.zeros((), dtype=torch.float64)
    for (low, high), advantage in zip(pairs, advantages, strict=True):
        tokens, written = made.tokens[low:high], made.written[low:high]
        loss = loss - advantage * token_logprobs(book, tokens, 0.8)[written[1:]].sum()
    (loss / len(pairs)).backward()
    found = one.model.data_parallel.parameters
    for key, parameter in held.parameters.items():
        ours, theirs = found[key].grad, parameter.grad
        assert (ours - theirs).norm() / theirs.norm() < 1e-9, key


def test_epochs_go_over_all_groups_in_another_order() -> None:
    one = reinforcement(
        config(**{**MOVING, "steps_per_rollout": 4, "prompts_per_step": 2}), model()
    )
    trainer_of(one).step()
    assert one.current is not None
    epochs = [
        [tuple(one._sequences_of(one.current, 4 * epoch + part).tolist()) for part in range(4)]
        for epoch in range(2)
    ]
    for parts in epochs:
        assert sorted(row for part in parts for row in part) == list(range(32))
    assert set(epochs[0]) != set(epochs[1])


# Groups without anything to teach.


def numbers_of(one: Reinforcement, groups: int) -> list[tuple[int, ...]]:
    """The prompts' ids of the groups of a rollout."""
    assert one.current is not None
    made = one.current.completions
    found = []
    for row in range(0, groups * 4, 4):
        start, stop = made.offsets[row], made.offsets[row + 1]
        said = made.written[start:stop]
        found.append(tuple(made.tokens[start:stop][~said].tolist()))
    return found


def dropping(dull: range, rounds: int, count: int = 12) -> Reinforcement:
    return reinforcement(
        config(
            reward="rl_cases:dull_for_some",
            policy={"drop_uninformative": True},
            resampling_rounds=rounds,
        ),
        model(),
        questions=prompts(count, dull),
    )


@pytest.mark.parametrize(("rounds", "expected"), [(0, None), (1, None), (9, 4)])
def test_dull_groups_are_replaced_by_later_prompts_until_there_are_enough(
    rounds: int, expected: int | None
) -> None:
    one = dropping(range(6), rounds)
    order = [drawn.prompt.metadata["dull"] for drawn in copy.deepcopy(one.sampler.prompts).take(60)]
    wanted, drawn, made, kept = 4, 0, 0, []
    while made <= rounds and len(kept) < wanted:
        missing = wanted - len(kept)
        kept += [i for i in range(drawn, drawn + missing) if not order[i]]
        drawn, made = drawn + missing, made + 1
    trainer_of(one).step()
    metrics = one.metrics()
    assert metrics["rl/sampling_rounds"] == made
    held = one.sampler.player.generator().metrics()["cache_tokens_held"]
    assert held > 0
    assert metrics["perf/cache_tokens_held"] >= held
    assert metrics["rl/groups_used"] == len(kept)
    assert expected is None or len(kept) == expected
    assert one.sampler.prompts.drawn == drawn
    assert metrics["rl/informative_groups"] == pytest.approx(len(kept) / drawn)
    assert one.current is not None
    assert len(one.current.rewards) == len(kept)
    again = copy.deepcopy(one.sampler.prompts)
    again.drawn = 0
    taken = again.take(drawn)
    assert numbers_of(one, len(kept)) == [taken[i].ids for i in kept]


def test_if_all_groups_are_dull_the_step_moves_nothing() -> None:
    one = dropping(range(12), 2)
    before = one.model.data_parallel.weights.clone()
    trainer = trainer_of(one)
    _, report = trainer.step()
    assert not bool(report.found_inf["rl"])
    assert report.gradient_norms["rl"] == 0
    assert torch.equal(one.model.data_parallel.weights, before)
    assert one.metrics()["rl/sampling_rounds"] == 3
    assert one.signal() == 0.0


# The length limit.


def test_a_sample_at_the_limit_loses_reward_over_the_buffer() -> None:
    plain = reinforcement(config(reward="rl_cases:always_equal"), model())
    other = reinforcement(
        config(
            reward="rl_cases:always_equal", policy={"overlong": "penalty", "overlong_buffer": 0.5}
        ),
        model(),
    )
    one, two = plain.sampler.rollout(), other.sampler.rollout()
    lengths = torch.segment_reduce(
        one.completions.written.double(), "sum", lengths=one.completions.lengths
    )
    assert torch.equal(one.completions.tokens, two.completions.tokens)
    assert len(lengths.unique()) > 2
    for length, before, after in zip(
        lengths.tolist(),
        one.rewards.flatten().tolist(),
        two.rewards.flatten().tolist(),
        strict=True,
    ):
        over = min(max(length - LONGEST_COMPLETION / 2, 0) / (LONGEST_COMPLETION / 2), 1)
        assert after == pytest.approx(before - over)


def test_a_masked_sample_at_the_limit_changes_nothing() -> None:
    given = config(policy={"overlong": "mask"})
    one = reinforcement(given, model())
    batch = one.next_batch()
    assert one.current is not None
    made = one.current.completions
    assert made.truncated is not None
    assert 0 < int(made.truncated.sum()) < len(made.truncated)
    finished = made.written & ~made.truncated[made.sequence_of_token]
    assert float(batch.weight) == int(finished.sum())
    learned = [part.inputs for part in batch.microbatches]
    assert sum(int(x.mask.sum()) for x in learned) == int(finished.sum())


def test_a_step_whose_samples_are_all_masked_moves_nothing() -> None:
    """At the start of training all samples may run into the limit."""
    one = reinforcement(config(policy={"overlong": "mask"}, max_completion_tokens=1), model())
    trainer = trainer_of(one)
    while True:  # until no sample stops at its first token
        before = one.model.data_parallel.weights.clone()
        trainer.optimizer.kept.shards["rl"]["exp_avg"].zero_()
        _, report = trainer.step()
        assert one.current is not None
        assert one.current.completions.truncated is not None
        if bool(one.current.completions.truncated.all()):
            break
    assert not bool(report.found_inf["rl"])
    assert report.gradient_norms["rl"] == 0
    assert torch.equal(one.model.data_parallel.weights, before)


# What is learned from, and what is said.


def test_the_stop_token_is_learned() -> None:
    one = reinforcement(config(), model())
    batch = one.next_batch()
    assert one.current is not None
    made = one.current.completions
    assert made.truncated is not None
    last = made.offsets[1:] - 1
    assert torch.equal(made.tokens[last] == 0, ~made.truncated)
    assert bool(made.written[last].all())
    learned = [part.inputs for part in batch.microbatches]
    assert sum(int(((x.targets == 0) & x.mask).sum()) for x in learned) == int(
        (~made.truncated).sum()
    )


def test_a_prompt_is_never_learned_and_what_was_said_always_is() -> None:
    one = reinforcement(config(), model())
    batch = one.next_batch()
    assert one.current is not None
    made = one.current.completions
    learned = [part.inputs for part in batch.microbatches]
    assert sum(int(x.mask.sum()) for x in learned) == int(made.written.sum())
    for row in range(len(made.lengths)):
        start, stop = int(made.offsets[row]), int(made.offsets[row + 1])
        said = made.written[start:stop].tolist()
        assert said == sorted(said)  # a prompt, then what was said


def test_ids_without_a_word_are_shown_as_unknown() -> None:
    one = reinforcement(config(), model())
    rollout = one.sampler.rollout()
    without = rollout.completions.tokens >= one.sampler.player.tokenizer.vocab_size
    assert bool(without.any())
    texts = [example["completion"] for example in rollout.shown()]
    assert any("\ufffd" in text for text in texts)


def test_kept_examples_are_the_first_two_groups_with_their_rewards() -> None:
    kept: list[tuple[int, list[dict[str, Any]]]] = []
    one = reinforcement(config(), model())

    def keep(number: int, examples: list[dict[str, Any]]) -> bool:
        kept.append((number, examples))
        return number == 1

    one.keep_samples = keep
    trainer = trainer_of(one)
    trainer.step()
    trainer.step()
    assert [number for number, _ in kept] == [0, 1]
    assert one.new_examples() == kept[1][1]
    assert one.new_examples() == []
    assert [len(examples) for _, examples in kept] == [8, 8]
    first = kept[0][1][0]
    assert set(first) == {
        *("prompt", "completion", "reference", "reward", "finish_reason"),
        *("group", "tokens", "logprobs", "advantage"),
    }
    assert [len(turn) for turn in first["tokens"]] == [len(turn) for turn in first["logprobs"]]
    assert all(value <= 0 for value in first["logprobs"][0])
    for group in (kept[0][1][:4], kept[0][1][4:]):
        assert len({one["group"] for one in group}) == 1
        assert abs(sum(one["advantage"] for one in group)) < 1e-3
        by_reward = sorted(group, key=lambda one: one["reward"])
        values = [one["advantage"] for one in by_reward]
        assert values == sorted(values)


# Rewards that fail.


def failing(samples: list[Any]) -> list[float]:
    raise RuntimeError("no judge today")


def test_a_reward_that_fails_stops_the_step_with_its_message() -> None:
    one = reinforcement(config(reward="test_rl_objective:failing"), model())
    with pytest.raises(RewardError, match=r"failed on 16 of 16 samples.*no judge today"):
        trainer_of(one).step()


def unsure(samples: list[Any]) -> list[float | None]:
    """Every eighth sample cannot be scored."""
    return [None if i % 8 == 3 else float(i % 3) for i in range(len(samples))]


def test_a_sample_without_a_reward_counts_nowhere() -> None:
    one = reinforcement(config(reward="test_rl_objective:unsure"), model())
    rollout = one.sampler.rollout()
    known = rollout.rewards.isfinite()
    assert int((~known).sum()) == 2
    assert not rollout.advantages.reshape(4, 4)[~known].any()
    expected = sample_advantages(PolicyConfig(), rollout.rewards[:1, :3])
    torch.testing.assert_close(rollout.advantages.reshape(4, 4)[:1, :3], expected)
    trainer = trainer_of(one)
    _, report = trainer.step()
    assert not bool(report.found_inf["rl"])


def test_signal_is_the_share_of_groups_with_something_to_teach() -> None:
    one = reinforcement(
        config(reward="rl_cases:dull_for_some", prompts_per_step=12),
        model(),
        questions=prompts(12, range(3)),
    )
    assert one.signal() is None
    trainer_of(one).step()
    assert one.signal() == pytest.approx(9 / 12)


def test_a_rollout_survives_json_bit_for_bit() -> None:
    import json

    one = reinforcement(config(**MOVING), model())
    trainer_of(one).step()
    state = json.loads(json.dumps(one.state()))
    other = reinforcement(config(**MOVING), model())
    other.load_state(state)
    assert one.current is not None
    assert other.current is not None
    for field, value in vars(one.current.completions).items():
        found = getattr(other.current.completions, field)
        assert torch.equal(found, value), field
    assert torch.equal(one.current.advantages, other.current.advantages)
    assert replace(other.current, metrics={}, examples=[]).sequences == one.current.sequences
