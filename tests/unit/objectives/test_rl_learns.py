"""Policy optimisation makes a policy better at what is rewarded, and at nothing but that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rl_cases import config, model, reinforcement, trainer_of

from megarlx.rollouts.rewards.answers import marked_answer
from megarlx.rollouts.rewards.sample import Sample

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from rl_learning import Task, learn, rl_config, train_start


@pytest.mark.parametrize("preset", ["grpo", "dapo", "dr_grpo", "rloo", "cispo"])
def test_the_reward_of_an_untrained_policy_rises(preset: str) -> None:
    one = reinforcement(config(policy={"preset": preset}, samples_per_prompt=8), model())
    trainer = trainer_of(one, lr=3e-3)
    rewards = []
    for _ in range(25):
        trainer.step()
        rewards.append(one.metrics()["rl/reward"])
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


def test_sums_are_answered_in_the_rewarded_format_also_where_nobody_asked_before(
    tmp_path: Path,
) -> None:
    task = Task(largest=4)
    start = train_start(task, 120, 0, tmp_path)
    found = learn(task, start, rl_config(8, 16), steps=40, lr=1e-3, seed=0)
    assert found.before < 0.3
    assert found.after > found.before + 0.2
    assert sum(found.rewards[-5:]) > sum(found.rewards[:5]) + 1.5


def sample(completion: str, reason: str = "stop", reference: str | None = "12") -> Sample:
    return Sample("3 + 9", completion, reference, {}, reason, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        (sample("#### 12"), 1.0),
        (sample("9 + 3 = 12 #### 12"), 1.0),
        (sample("#### 12 12"), 0.0),
        (sample("#### 112"), 0.0),
        (sample("#### 12 #### 12"), 0.0),
        (sample("12"), 0.0),
        (sample("####"), 0.0),
        (sample(""), 0.0),
        (sample("#### 12", "length"), 0.0),
        (sample("#### 12", "stop_string"), 1.0),
        (sample("#### 12", reference=None), None),
    ],
)
def test_a_marked_answer_is_the_reference_said_once_at_the_end(
    said: Sample, reward: float | None
) -> None:
    assert marked_answer([said]) == [reward]
