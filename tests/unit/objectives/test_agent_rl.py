"""Policy optimisation over several turns, as the objective that it is for one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_cases import agent_config, agents, tasks
from pydantic import ValidationError
from rl_cases import config, model, prompts, reinforcement, trainer_of
from torch import Tensor

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Group
from megarlx.config.objectives import RlConfig
from megarlx.config.policy import PolicyConfig
from megarlx.generation.requests import Request, Trajectory
from megarlx.objectives.losses import loss_spec
from megarlx.objectives.policy import Reinforcement
from megarlx.objectives.policy_loss import policy_fields
from megarlx.ops import linear_token_loss
from megarlx.rollouts.environments.process import BrokenEnvironment, Failure
from megarlx.rollouts.episodes import Episode, EpisodeBatch, Turn
from megarlx.training.trainer import Trainer

SAMPO = {"preset": "sampo"}
MOVING: dict[str, Any] = {"steps_per_rollout": 2, "epochs_per_rollout": 2}


def weights(trainer: Trainer) -> list[Tensor]:
    optimizer = trainer.optimizer
    return [*optimizer.shards.shards.values(), trainer.model.data_parallel.weights]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "policy", [{"preset": "grpo"}, {"preset": "gspo"}, {"advantage": "rloo"}], ids=str
)
def test_episodes_of_one_turn_train_exactly_as_completions_do(
    policy: dict[str, Any], temperature: float
) -> None:
    given = {**MOVING, "policy": policy, "temperature": temperature}
    single = reinforcement(config(**given), model())
    turned = agents(agent_config(1, **given), model(), questions=tasks())
    assert [p.question for p in prompts()] == [p.question for p in tasks()]
    one, other = trainer_of(single), trainer_of(turned)
    for _ in range(5):
        assert one.global_loss(one.step()[0]) == other.global_loss(other.step()[0])
        for key in ("rl/reward", "rl/entropy", "rl/generated_tokens", "rl/informative_groups"):
            assert single.metrics()[key] == turned.metrics()[key], key
    for a, b in zip(weights(one), weights(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop", range(1, 9))
def test_n_plus_n_steps_are_2n_steps_also_inside_of_a_rollout(tmp_path: Path, stop: int) -> None:
    def made(seed: int) -> tuple[Trainer, Reinforcement]:
        one = agents(agent_config(policy=SAMPO, **MOVING), model(seed))
        return trainer_of(one), one

    whole, first = made(3)
    losses = []
    saver = Saver(tmp_path, Group.alone("world"))
    for step in range(9):
        if step == stop:
            whole.save(saver, {}, blocking=True)
        losses.append(whole.global_loss(whole.step()[0]))
    parts, second = made(8)
    parts.resume(tmp_path / f"iter_{stop:08d}")
    for step in range(stop, 9):
        assert parts.global_loss(parts.step()[0]) == losses[step]
    for a, b in zip(weights(parts), weights(whole), strict=True):
        assert torch.equal(a, b)
    assert second.work == first.work


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_every_log_prob_of_every_turn(temperature: float) -> None:
    one = agents(agent_config(temperature=temperature), model())
    trainer = trainer_of(one, lr=0.0)
    for _ in range(3):
        trainer.step()
        metrics = one.metrics()
        assert 0 < metrics["rl/logprob_gap_max"] <= 1e-5
        assert metrics["rl/turns_Early"] == 3


@pytest.mark.parametrize("preset", ["grpo", "gigpo", "sampo", "cispo"])
def test_the_success_of_an_untrained_policy_rises(preset: str) -> None:
    policy = {"preset": preset} | ({"clip_high": 0.2} if preset == "sampo" else {})
    one = agents(agent_config(policy=policy, samples_per_prompt=8), model())
    trainer = trainer_of(one, lr=3e-3)
    rewards = []
    for _ in range(25):
        trainer.step()
        rewards.append(one.metrics()["rl/reward"])
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5


# SAMPO, by its definition.


def played(group: int, number: int, texts: list[str], rewards: list[float]) -> Episode:
    """Turns of different lengths between observations that nobody wrote."""
    generator = torch.Generator().manual_seed(number)
    turn = [-1, -1]
    for k in range(len(texts)):
        turn += [k] * (1 + (number + k) % 3) + [-1] * (k + 1 < len(texts))
    tokens = torch.randint(11, (len(turn),), generator=generator)
    written = torch.tensor(turn) >= 0
    logprobs = -torch.rand(len(turn), generator=generator).where(written, torch.zeros(()))
    made = Trajectory(
        Request(tokens[:2].tolist(), (number,), 9),
        *(number, tokens, torch.tensor(turn), logprobs, logprobs, ("stop",) * len(texts), False),
    )
    turns = tuple(Turn(t, "", r, t != "bad") for t, r in zip(texts, rewards, strict=True))
    return Episode(group, number, turns, rewards[-1] > 0, made)


def normalised(value: float, among: list[float]) -> float:
    values = torch.tensor(among, dtype=torch.float64)
    if len(values) < 2 or float(values.std()) < 1e-9:
        return 0.0
    return float((value - values.mean()) / (values.std() + 1e-4))


def test_sampo_is_its_definition() -> None:
    episodes = [
        played(0, 0, ["a", "b", "bad"], [0.0, 0.0, 1.0]),
        played(0, 1, ["a", "c"], [0.0, 0.0]),
        played(0, 2, ["a", "b"], [0.0, 1.0]),
        played(1, 3, ["a"], [1.0]),
        played(1, 4, ["a", "b", "b", "d"], [0.0, 0.5, 0.0, 0.0]),
        played(1, 5, ["bad"], [0.0]),
    ]
    penalty, beta, low, high = 0.1, 0.01, 1 - 3e-3, 1 + 4e-3
    policy = PolicyConfig(preset="sampo", omega=0.6, gamma=0.9)
    batch = EpisodeBatch.of(episodes, penalty)
    generator = torch.Generator().manual_seed(9)

    def noise(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    total = len(batch.completions.tokens)
    hidden, head = noise(total, 6).requires_grad_(), noise(11, 6).requires_grad_()
    tokens, written = batch.completions.tokens, batch.completions.written
    now = (hidden @ head.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    shift = torch.tensor([2e-3, -2e-2, 3e-2, -1e-2, 1e-3, 6e-3], dtype=torch.float64)
    moved = shift[batch.completions.sequence_of_token] + noise(total, scale=1e-3)
    old = (now.detach() - moved).where(written, 0)
    ref = (now.detach() + noise(total, scale=0.3)).where(written, 0)

    # By hand.
    taken = [[t.reward - penalty * (not t.valid) for t in e.turns] for e in episodes]
    returns = [
        [sum(0.9 ** (j - k) * row[j] for j in range(k, len(row))) for k in range(len(row))]
        for row in taken
    ]
    losses = []
    for i, episode in enumerate(episodes):
        places = (batch.completions.sequence_of_token == i) & written
        team = range(episode.group * 3, episode.group * 3 + 3)
        whole = normalised(sum(taken[i]), [sum(taken[j]) for j in team])
        both = []
        for k, turn in enumerate(episode.turns):
            same = [
                returns[j][m]
                for j in team
                for m, t in enumerate(episodes[j].turns)
                if t.observation == turn.observation
            ]
            both.append(whole + 0.6 * normalised(returns[i][k], same))
        a = torch.tensor([both[k] for k in batch.turn[places]], dtype=torch.float64)
        lp, before, d = now[places], old[places], ref[places] - now[places]
        s = (lp - before).mean().exp().detach() * lp.exp() / lp.exp().detach()
        gain = torch.minimum(s * a, s.clamp(low, high) * a)
        losses.append((-gain + beta * (d.exp() - d - 1)).mean())
    expected = torch.stack(losses).mean()
    wanted = torch.autograd.grad(expected, (hidden, head), retain_graph=True)

    # By megarlx.
    made = replace(batch.completions, old_logprobs=old, ref_logprobs=ref)
    fields = policy_fields(
        policy,
        made,
        batch.token_advantages(policy),
        max_completion_tokens=9,
    )
    result = linear_token_loss(
        hidden,
        head,
        tokens,
        loss_spec(policy),
        mask=fields.mask,
        normalizer=fields.sequence_weights.sum(),
        advantages=fields.advantages,
        old_logprobs=fields.old_logprobs,
        ref_logprobs=fields.ref_logprobs,
        token_weights=fields.token_weights,
        sequence=made.sequence_of_token,
        sequences=len(made.lengths),
    )
    torch.testing.assert_close(result.loss.squeeze(), expected, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(result.loss.sum(), (hidden, head))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_groups_of_a_batch_are_the_same_chosen_and_joined_again() -> None:
    episodes = [
        played(
            g,
            2 * g + i,
            ["a", "b", "c"][: 1 + (g + i) % 3],
            [0.5, 0.25, float(i)][: 1 + (g + i) % 3],
        )
        for g in range(4)
        for i in range(2)
    ]
    lost = Episode(2, 4, (), False, None, Failure("timeout", ""))
    episodes = [lost if e.sequence_id == 4 else e for e in episodes]
    whole = EpisodeBatch.of(episodes, 0.1)
    again = EpisodeBatch.joined([whole.chosen([3, 1]), whole.chosen([]), whole.chosen([0, 2])])
    assert again.numbers == whole.numbers == (0, 1, 2, 3)
    for name in ("kept", "turns", "step_rewards", "observations", "turn", "turn_of_token"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert torch.equal(again.completions.tokens, whole.completions.tokens)
    a, b = (batch.token_advantages(PolicyConfig(advantage="gigpo")) for batch in (again, whole))
    assert torch.equal(a, b)
    assert whole.groups.tolist() == [0, 0, 1, 1, 2, 3, 3]


# What is drawn, dropped and lost.


def test_groups_without_signal_are_replaced_once_the_cold_start_is_over() -> None:
    policy = {"drop_uninformative": True, "drop_uninformative_after_steps": 2}
    limits = {"options": {"dull": True}}
    one = agents(
        agent_config(2, limits=limits, policy=policy),
        model(),
        questions=tasks(11, dull=[0, 2, 3, 5, 7, 8]),
    )
    trainer = trainer_of(one)
    rounds = []
    for _ in range(4):
        trainer.step()
        rounds.append(one.metrics()["rl/sampling_rounds"])
        assert one.metrics()["rl/groups_used"] == 4
    assert rounds[:2] == [1, 1]
    assert min(rounds[2:]) > 1
    assert one.current is not None
    assert one.current.groups.tolist() == [g for g in range(4) for _ in range(4)]


def test_lost_episodes_are_counted_and_the_rest_is_learned_from() -> None:
    limits = {"options": {"raise_on": "w3"}, "allowed_failures": 0.9}
    one = agents(agent_config(limits=limits), model())
    trainer = trainer_of(one)
    lost = 0.0
    for _ in range(4):
        before = [t.clone() for t in weights(trainer)]
        trainer.step()
        lost += one.metrics()["rl/environment_failures_Early"]
        after = weights(trainer)
        assert all(t.isfinite().all() for t in after)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert lost > 3
    assert one.current is not None
    known = one.current.rewards.isfinite()
    assert 0 < int(known.sum()) < known.numel()
    limits = {"options": {"raise_on": "w3"}, "allowed_failures": 0.01}
    trainer = trainer_of(agents(agent_config(limits=limits), model()))
    with pytest.raises(BrokenEnvironment, match=r"^environment agent_cases:Early: lost .* of 16 "):
        trainer.step()


def test_a_task_that_cannot_begin_takes_no_part_and_its_rollout_is_used_up() -> None:
    limits = {"allowed_failures": 0.5}
    one = agents(agent_config(limits=limits, **MOVING), model(), questions=tasks(8, broken=[1]))
    trainer = trainer_of(one)
    for _ in range(4):
        trainer.step()
    assert one.metrics()["rl/groups_used"] == 7
    assert one.metrics()["rl/environment_failures_Early"] == 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policy": {"preset": "sampo"}}, "it needs turns"),
        ({"environment": {"function": "shop"}, "policy": {"preset": "dapo"}}, "'keep' or 'mask'"),
        ({"environment": {"function": "shop"}, "tokens_per_microbatch": 64}, "has up to"),
        (
            {"environment": {"function": "shop"}, "rewards": [{"function": "m:f"}]},
            "cannot be given with an environment",
        ),
    ],
)
def test_what_does_not_go_with_turns_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RlConfig.model_validate(wrong)
