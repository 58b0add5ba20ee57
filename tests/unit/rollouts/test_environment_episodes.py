"""Episodes of a policy in an environment, and what a policy loss makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from misbehaving_environments import Rooms

from megarlx.comm.groups import Group
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.model import family_config
from megarlx.config.policy import PolicyConfig
from megarlx.data.conversations import Conversation, Frames
from megarlx.data.conversations import Turn as Said
from megarlx.data.prompts import Prompt
from megarlx.data.tokenizer import WordTokenizer
from megarlx.generation.engine import Engine
from megarlx.generation.requests import NOT_WRITTEN, Request, SamplingSettings, Trajectory
from megarlx.model.transformer import Stage
from megarlx.objectives.policy_loss import policy_fields
from megarlx.rollouts.advantages import sample_advantages
from megarlx.rollouts.completions import Completions
from megarlx.rollouts.environment_game import EnvironmentGame
from megarlx.rollouts.environments.process import BrokenEnvironment, Failure
from megarlx.rollouts.episodes import (
    Episode,
    EpisodeBatch,
    Turn,
    metrics_of,
    observation_hash,
    stop_if_too_many_failed,
)
from megarlx.rollouts.player import Player, Start

TEMPLATE = Frames(user="seen : {content} act :", assistant=" {content}")
WORDS = ("seen", ":", "act", "go", "stay", "lose", "win", "task", "room", *map(str, range(20)))
TOKENIZER = WordTokenizer(WORDS)


def model() -> Stage:
    config = family_config(
        "olmo2",
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        init_std=0.1,
        max_sequence_length=256,
    )
    return Stage(config).initialise_(17)


@contextmanager
def player(stage: Stage, slots: int = 8, **changes: Any) -> Iterator[Player]:
    settings = {
        "function": "misbehaving_environments:Rooms",
        "max_turns": 4,
        "max_turn_tokens": 5,
        "max_episode_tokens": 96,
        "workers": 0,
    }
    config = EnvironmentConfig(**{"allowed_failures": 1.0, **settings, **changes})
    engine = Engine([stage], slots=slots, longest=128, one_width=True)
    made = Player(
        lambda: engine, EnvironmentGame(config, TEMPLATE, TOKENIZER, engine.mesh), TOKENIZER
    )
    try:
        yield made
    finally:
        made.close()


def played(made: Player, seed: int, given: list[Start] | None = None) -> list[Episode]:
    return made.play(starts() if given is None else given, STOPS, seed, Group.alone("dp"))


def starts(tasks: int = 6, samples: int = 4) -> list[Start]:
    return [
        Start(
            t,
            tuple(range(t * samples, (t + 1) * samples)),
            Prompt("", None, {"task": {"number": t}}),
            seed=7,
        )
        for t in range(tasks)
    ]


STOPS = SamplingSettings(stop_tokens=(TOKENIZER.eos_id,), temperature=1.5)


def test_tokens_are_those_that_supervised_learning_sees_of_the_same_conversation() -> None:
    with player(model(), max_turn_tokens=30, max_episode_tokens=128) as made:
        episodes = played(made, 1)
    compared = 0
    for episode in episodes:
        trajectory = episode.trajectory
        assert trajectory is not None
        turns = [Said(m["role"], m["content"]) for m in episode.messages()]  # type: ignore[arg-type]
        ids, learned = TEMPLATE.encode(Conversation(tuple(turns)), TOKENIZER)
        if "length" in trajectory.reasons:
            continue
        compared += 1
        assert trajectory.tokens.tolist() == ids
        assert trajectory.written.tolist() == learned
    assert compared > 10


def test_an_answer_that_was_cut_off_is_ended_for_the_policy_and_not_learned() -> None:
    with player(model(), max_turn_tokens=2) as made:
        episodes = played(made, 1)
    cut = 0
    for episode in episodes:
        trajectory = episode.trajectory
        assert trajectory is not None
        for turn, reason in enumerate(trajectory.reasons[:-1]):
            (places,) = torch.nonzero(trajectory.turn == turn, as_tuple=True)
            behind = int(places[-1]) + 1
            if reason == "length":
                assert trajectory.tokens[behind] == TOKENIZER.eos_id
                assert trajectory.turn[behind] == NOT_WRITTEN
                cut += 1
            else:
                assert trajectory.tokens[behind] == TOKENIZER.encode("seen")[0]
    assert cut > 5


def test_rewards_flags_and_observations_of_turns_are_those_of_the_environment() -> None:
    with player(model()) as made:
        episodes = played(made, 2)
    assert [e.sequence_id for e in episodes] == list(range(24))
    ended: set[str] = set()
    for episode in episodes:
        environment = Rooms()
        seen = environment.reset({"number": episode.group}, 7)
        for number, turn in enumerate(episode.turns):
            assert turn.observation == seen
            seen, reward, done, info = environment.step(turn.action)
            assert (turn.reward, turn.valid) == (reward, info["valid"])
            assert done == (number == len(episode.turns) - 1 and len(episode.turns) < 4) or (
                len(episode.turns) == 4 and number == 3
            )
            assert episode.success == info["success"] or number < len(episode.turns) - 1
        ended.add("turns" if not done else "success" if episode.success else "end")
    assert ended == {"turns", "success", "end"}


@pytest.mark.parametrize("misbehave", ["raise", "unknown word"])
def test_lost_episodes_leave_the_others_as_they_were(misbehave: str) -> None:
    stage = model()
    with player(stage) as made:
        fine = played(made, 3)
    with player(stage, options={"misbehave": misbehave}) as made:
        found = played(made, 3)
    lost = [e.failure is not None for e in found]
    assert 0 < sum(lost) < 24
    for one, other, is_lost in zip(fine, found, lost, strict=True):
        # what is seen after the last turn is shown to nobody
        looked_at = other.turns if misbehave == "raise" else other.turns[:3]
        assert is_lost == any("lose" in turn.action for turn in looked_at)
        if not is_lost:
            assert one.turns == other.turns
            assert torch.equal(one.trajectory.tokens, other.trajectory.tokens)  # type: ignore[union-attr]
    kinds = {e.failure.kind for e in found if e.failure is not None}
    assert kinds == {"error" if misbehave == "raise" else "not_encodable"}
    batch = EpisodeBatch.of(found, 0.1)
    assert batch.rewards.isnan().flatten().tolist() == lost
    advantages = batch.token_advantages(PolicyConfig(advantage="gigpo"))
    assert advantages.isfinite().all()
    of_lost = torch.tensor(lost)[batch.episode_of_turn][batch.turn_of_token.clamp_min(0)]
    assert advantages[of_lost].abs().sum() == 0
    assert metrics_of(found, "rooms")["rl/environment_failures_rooms"] == (sum(lost), 1)
    config = EnvironmentConfig(function="shop", allowed_failures=sum(lost) / 24)
    stop_if_too_many_failed(config, found, Group.alone("dp"))
    with pytest.raises(BrokenEnvironment, match=rf"^environment shop: lost {sum(lost)} of 24 epi"):
        stop_if_too_many_failed(config.model_copy(update={"allowed_failures": 0.01}), found)


def test_the_reason_that_is_told_is_of_an_episode_that_was_asked() -> None:
    """Not of one that was no longer, though its number is lower."""
    kinds = (("not_asked", "16 of the 16 episodes before it failed"), ("error", "the door jams"))
    lost = [
        Episode(0, number, (), False, None, Failure(kind, detail))  # type: ignore[arg-type]
        for number, (kind, detail) in enumerate(kinds)
    ]
    config = EnvironmentConfig(function="shop")
    with pytest.raises(BrokenEnvironment, match=r"The first \(error: the door jams\)"):
        stop_if_too_many_failed(config, lost)
    with pytest.raises(BrokenEnvironment, match=r"The first \(not_asked: 16 of"):
        stop_if_too_many_failed(config, lost[:1])


def test_samples_are_the_same_for_any_number_of_slots_and_workers() -> None:
    stage, found = model(), []
    for slots, workers in ((8, 0), (16, 0), (5, 2)):
        with player(stage, slots, workers=workers) as made:
            found.append(played(made, 4))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one.turns == two.turns
            assert torch.equal(one.trajectory.tokens, two.trajectory.tokens)  # type: ignore[union-attr]


def test_a_first_observation_without_room_for_an_answer_loses_the_episode_and_says_why() -> None:
    with player(model(), max_episode_tokens=12, max_turn_tokens=5) as made:
        (episode, *_) = played(made, 1, starts(1, 2))
    assert episode.trajectory is None
    assert episode.failure == Failure(
        "too_long",
        "the first observation has 8 tokens; max_episode_tokens less max_turn_tokens allows 7",
    )
    batch = EpisodeBatch.of([episode])
    assert (
        len(batch.completions.lengths)
        == len(batch.token_advantages(PolicyConfig(advantage="gigpo")))
        == 0
    )


def trajectory(sequence_id: int, tokens: list[int], turn: list[int], seed: int = 0) -> Trajectory:
    logprobs = -torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed))
    logprobs = logprobs.where(torch.tensor(turn) != NOT_WRITTEN, 0)
    reasons = ("stop",) * (max(turn) + 1)
    request = Request(tokens[:1], (sequence_id,), 9)
    return Trajectory(
        *(request, sequence_id, torch.tensor(tokens), torch.tensor(turn)),
        *(logprobs, logprobs, reasons, False),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"preset": "grpo"}, {"preset": "gspo"}, {"preset": "dr_grpo"}, {"importance_cap": 2.0}],
    ids=str,
)
def test_single_turns_give_exactly_what_prompts_and_completions_give(
    settings: dict[str, Any],
) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(9, (3 + i // 2,), generator=generator).tolist() for i in range(8)]
    sampled = [torch.randint(9, (2 + i % 3,), generator=generator) for i in range(8)]
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.25], [1.0, 0.0, torch.nan, 0.0]]).double()
    episodes = [
        Episode(
            i // 4,
            i,
            (Turn(f"question {i // 4}", "answer", float(rewards.flatten()[i].nan_to_num())),),
            True,
            trajectory(i, p + s.tolist(), [-1] * len(p) + [0] * len(s), i),
            Failure("error", "") if i == 6 else None,
        )
        for i, (p, s) in enumerate(zip(prompts, sampled, strict=True))
    ]
    config = PolicyConfig(**settings)
    batch = EpisodeBatch.of(episodes)
    assert torch.equal(batch.rewards, rewards) or torch.equal(
        batch.rewards.nan_to_num(-9), rewards.nan_to_num(-9)
    )
    single = Completions.of(
        prompts,
        sampled,
        rollout_logprobs=[e.trajectory.logprobs[e.trajectory.written] for e in episodes],  # type: ignore[union-attr]
        truncated=[False] * 8,
    )
    for name in ("tokens", "lengths", "written", "rollout_logprobs", "truncated"):
        assert torch.equal(getattr(batch.completions, name), getattr(single, name)), name
    old = {name: torch.randn(len(single.tokens)) for name in ("old_logprobs", "ref_logprobs")}
    fields = [
        policy_fields(config, replace(made, **old), given, max_completion_tokens=9)
        for made, given in (
            (single, sample_advantages(config, rewards).flatten()),
            (batch.completions, batch.token_advantages(config)),
        )
    ]
    mask = fields[0].mask
    for name in ("mask", "sequence_weights", "old_logprobs", "ref_logprobs", "token_weights"):
        one, other = (getattr(f, name) for f in fields)
        assert (one is None and other is None) or torch.equal(one, other), name
    assert torch.equal(fields[0].advantages[mask], fields[1].advantages[mask])


def test_advantages_of_turns_are_gigpo_by_its_definition() -> None:
    """Two tasks of two episodes; which turns saw the same is a matter of their texts."""
    texts = [["a", "b", "a"], ["a", "b"], ["a"], ["a", "c"]]
    rewards = [[0.0, 0.0, 1.0], [0.0, -0.5], [1.0], [0.0, 0.0]]
    valid = [[True, False, True], [True, True], [True], [True, False]]
    penalty, gamma, omega = 0.1, 0.9, 0.7
    episodes = []
    for i, row in enumerate(texts):
        tokens, turn = [1, 2], [-1, -1]
        for k in range(len(row)):
            tokens += [3 + k, 4, 5]
            turn += [k, k, -1]
        turns = tuple(
            Turn(f"task {i // 2} {text}", "", rewards[i][k], valid[i][k])
            for k, text in enumerate(row)
        )
        episodes.append(Episode(i // 2, i, turns, False, trajectory(i, tokens, turn)))
    batch = EpisodeBatch.of(episodes, penalty)
    taken = [
        [r - penalty * (not v) for r, v in zip(*both, strict=True)]
        for both in zip(rewards, valid, strict=True)
    ]
    assert batch.rewards.flatten().tolist() == pytest.approx([sum(row) for row in taken])

    def normalised(value: float, among: list[float]) -> float:
        values = torch.tensor(among, dtype=torch.float64)
        if len(values) < 2 or values.std() < 1e-6:
            return 0.0
        return float((value - values.mean()) / (values.std() + 1e-4))

    returns = [
        [sum(gamma ** (j - k) * row[j] for j in range(k, len(row))) for k in range(len(row))]
        for row in taken
    ]
    expected = []
    for i, row in enumerate(texts):
        pair = range(i // 2 * 2, i // 2 * 2 + 2)
        whole = normalised(sum(taken[i]), [sum(taken[j]) for j in pair])
        expected += [0.0, 0.0]
        for k, text in enumerate(row):
            same = [returns[j][m] for j in pair for m, t in enumerate(texts[j]) if t == text]
            both = whole + omega * normalised(returns[i][k], same)
            expected += [both, both, 0.0]
    found = batch.token_advantages(PolicyConfig(advantage="gigpo", gamma=gamma, omega=omega))
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5
    )
    assert not torch.equal(found, batch.token_advantages(PolicyConfig()))


def test_metrics_are_sums_and_counts() -> None:
    turns = (Turn("a", "x", 0.0, False), Turn("b", "y", 1.0))
    episodes = [
        Episode(0, 0, turns, True, trajectory(0, [1, 2, 3, 4], [-1, 0, -1, 1])),
        Episode(0, 1, turns[:1], False, trajectory(1, [1, 2], [-1, 0])),
        Episode(0, 2, (), False, None, Failure("timeout", "")),
    ]
    found = metrics_of(episodes, "rooms", 0.25)
    assert found["rl/reward"] == (0.5, 2)
    assert found["rl/success_rooms"] == (1, 2)
    assert found["rl/valid_actions_rooms"] == (1, 3)
    assert found["rl/turns_rooms"] == (3, 2)
    assert found["rl/environment_failures_rooms"] == (1, 1)


def test_groups_of_different_sizes_and_missing_rewards_are_refused() -> None:
    one = Episode(0, 0, (Turn("a", "x"),), True, trajectory(0, [1, 2], [-1, 0]))
    with pytest.raises(ValueError, match=r"tasks have \[1, 2\] episodes"):
        EpisodeBatch.of([one, one, replace(one, group=1)])
    with pytest.raises(ValueError, match="sequence 0 has 1 turns of tokens and 0 of rewards"):
        EpisodeBatch.of([replace(one, turns=())])


def test_hashes_are_the_same_everywhere_and_fit_a_tensor() -> None:
    assert observation_hash("a") == 7299139317422481125
    assert len({observation_hash(str(i)) for i in range(1000)}) == 1000
    torch.tensor([observation_hash(str(i)) for i in range(1000)])
