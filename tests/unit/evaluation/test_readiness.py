"""Whether groups can teach: against counting the groups that can be drawn."""

import itertools
import math

import pytest

from megarlx.config.objectives import RlConfig
from megarlx.config.reward import RewardConfig
from megarlx.evaluation.readiness import equal_rewards, informative_groups, readiness_suite


def test_informative_groups_are_those_with_both_outcomes() -> None:
    every = (0, 1, 3, 6)
    shares = []
    for correct in every:
        groups = list(itertools.combinations(range(6), 3))
        shares.append(sum(0 < sum(i < correct for i in g) < 3 for g in groups) / len(groups))
    items = [{"samples": 6, "correct": correct} for correct in every]
    assert informative_groups(items, 3).mean == pytest.approx(sum(shares) / 4)
    assert (shares[0], shares[3]) == (0, 0)


def test_partial_credit_informs_though_nothing_is_right() -> None:
    alike = equal_rewards([0.3, 0.3, 0.1 + 0.2, 0.6, math.nan, math.inf])
    assert alike == [3, 1]
    items = [{"samples": 6, "correct": 0, "alike": alike}]
    groups = list(itertools.combinations("aaab??", 2))
    mixed = sum({*group} == {"a", "b"} for group in groups) / len(groups)
    assert informative_groups(items, 2).mean == pytest.approx(mixed)


def test_the_probe_draws_as_training_will() -> None:
    rl = RlConfig(
        samples_per_prompt=16,
        generator="my_engine:Fast",
        temperature=0.7,
        max_completion_tokens=9,
        rewards=(
            RewardConfig(function="marked_answer", weight=3.0),
            RewardConfig(function="answer_format", weight=0.1),
        ),
    )
    probe = readiness_suite(
        "rl", rl, prompts=5, path="q.jsonl", max_prompt_tokens=40, examples="d.jsonl", shown=2
    )
    assert (probe.name, probe.questions, probe.path) == ("rl-readiness", 5, "q.jsonl")
    assert (probe.samples, probe.group_size, probe.ks) == (16, 16, (1, 8, 16))
    assert (probe.temperature, probe.max_new_tokens, probe.max_prompt_tokens) == (0.7, 9, 40)
    assert probe.generator == "my_engine:Fast"
    assert (probe.few_shot, probe.few_shot_trained, probe.few_shot_path) == (2, 2, "d.jsonl")
    assert [(one.function, one.weight) for one in probe.rewards] == [("marked_answer", 1.0)]


def test_an_agents_probe_plays_its_environment() -> None:
    place = {"function": "megarlx.study.environments.sokoban:Sokoban"}
    rl = RlConfig.model_validate({"samples_per_prompt": 4, "environment": place})
    probe = readiness_suite("rl", rl, prompts=5, path="tasks.jsonl")
    assert (probe.kind, probe.samples, probe.group_size, probe.questions) == ("agent", 4, 4, 5)
    assert probe.environment == rl.environment
