"""Success of a policy in an environment, counted over tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generators_for_tests
import pytest
from environments_for_tests import Letters
from evaluated_models import subject
from pydantic import ValidationError

from megarlx.config.evaluation import EvaluationConfig, SuiteConfig
from megarlx.evaluation.questions import questions_of
from megarlx.evaluation.sampled import at_random
from megarlx.evaluation.suites import evaluate
from megarlx.rollouts.environments.process import BrokenEnvironment

ENVIRONMENT = {
    "function": "environments_for_tests:Letters",
    "max_turns": 3,
    "max_turn_tokens": 4,
    "max_episode_tokens": 60,
    "workers": 0,
}


def suite(path: Path, broken: bool = False, **fields: Any) -> SuiteConfig:
    names = ("tom", "ann", "eva", "max", "lea")
    rows = [
        {"question": name, "task": {"name": name, "broken": broken and i == 1}, "id": f"test/{i}"}
        for i, name in enumerate(names)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"name": "s", "kind": "agent", "path": str(path), "samples": 4, "temperature": 1.0}
    environment = {**ENVIRONMENT, **fields.pop("environment", {})}
    return SuiteConfig.model_validate({**given, "environment": environment, **fields})


def test_items_count_what_the_kept_episodes_show(tmp_path: Path) -> None:
    chosen = EvaluationConfig(suites=(suite(tmp_path / "t.jsonl"),), slots=8, kept_samples=4)
    (found,) = evaluate(subject(), chosen, run=tmp_path / "run")
    path = tmp_path / "run" / "samples" / "iter_00000007.s.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(kept) == 5 * 4
    assert {"success"} < {line["finish_reason"] for line in kept} <= {"success", "stop", "length"}
    for item in found["items"]:
        own = [line for line in kept if line["id"] == item["id"]]
        assert item["correct"] == sum(line["finish_reason"] == "success" for line in own)
        assert item["reward"] == pytest.approx(sum(line["reward"] for line in own) / 4)
        assert item["turns"] == 3
        for line in own:
            environment = Letters()
            assert line["prompt"] == environment.reset({"name": line["prompt"]}, 0)
            said = [t.removeprefix("did: ") for t in line["completion"].split("\n")[::2]]
            seen = [t.removeprefix("  saw: ") for t in line["completion"].split("\n")[1::2]]
            steps = [environment.step(text.removesuffix("  (not valid)")) for text in said]
            assert seen == [step[0] for step in steps[:-1]]
            assert [text.endswith("  (not valid)") for text in said] == [
                not step[3]["valid"] for step in steps
            ]
    solved = [item["correct"] / 4 for item in found["items"]]
    assert found["metrics"]["success"] == pytest.approx(sum(solved) / 5)
    assert 0 < found["metrics"]["success"] < 1
    assert found["metrics"]["lost"] == 0
    again = evaluate(subject(), chosen)
    assert again[0]["items"] == found["items"]


def test_a_generator_that_only_completes_prompts_plays_the_same_episodes(tmp_path: Path) -> None:
    generators_for_tests.asked.clear()
    path = tmp_path / "t.jsonl"
    other = suite(path, generator="generators_for_tests:Counting")
    one, two = (
        evaluate(subject(), EvaluationConfig(suites=(which,)))[0] for which in (suite(path), other)
    )
    assert len(generators_for_tests.asked) == 3  # turns
    assert one["items"] == two["items"]


def test_the_share_of_informative_groups_is_of_tasks_solved_at_times(tmp_path: Path) -> None:
    chosen = EvaluationConfig(suites=(suite(tmp_path / "t.jsonl", group_size=4),), slots=8)
    (found,) = evaluate(subject(), chosen)
    mixed = [0 < item["correct"] < 4 for item in found["items"]]
    assert found["metrics"]["informative_groups"] == pytest.approx(sum(mixed) / 5)
    assert found["metrics"]["pass_at_1"] == pytest.approx(found["metrics"]["success"])


def test_lost_episodes_count_nowhere_and_too_many_stop(tmp_path: Path) -> None:
    some = suite(tmp_path / "t.jsonl", True, environment={"allowed_failures": 0.25})
    (found,) = evaluate(subject(), EvaluationConfig(suites=(some,)))
    assert [item["samples"] for item in found["items"]] == [4, 0, 4, 4, 4]
    assert found["items"][1]["success"] is None
    assert found["metrics"]["lost"] == 0.2
    none = suite(tmp_path / "t.jsonl", True)
    with pytest.raises(BrokenEnvironment, match="lost 4 of 20 episodes"):
        evaluate(subject(), EvaluationConfig(suites=(none,)))


def test_acting_at_random_stands_beside_environments_that_know_their_actions(
    tmp_path: Path,
) -> None:
    one_move = [{"task": {"rows": ["P o x"]}, "question": "P o x"}] * 50
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one_move))
    given = {"name": "s", "kind": "agent", "path": str(tmp_path / "t.jsonl"), "samples": 40}

    def reached(environment: dict[str, Any]) -> dict[str, float]:
        asked = SuiteConfig(**given, environment=environment)
        return at_random(asked, questions_of(asked, None), 3)

    environment = {"function": "sokoban", "max_turns": 1, "workers": 0}
    (rate,) = reached(environment).values()
    assert abs(rate - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    twice = {**environment, "max_turns": 2}
    (rate,) = reached(twice).values()
    assert abs(rate - 0.4375) < 5 * (0.4375 * 0.5625 / 2000) ** 0.5
    assert reached(ENVIRONMENT) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"environment": None},
        {"kind": "pass_at_k"},
        {"path": None},
        {"rewards": [{"function": "final_number"}]},
    ],
    ids=str,
)
def test_what_an_agent_suite_needs_is_asked_for(wrong: dict[str, Any]) -> None:
    given = {"name": "s", "kind": "agent", "path": "p", "environment": ENVIRONMENT}
    SuiteConfig.model_validate(given)
    with pytest.raises(ValidationError, match=r"environment|path|rewards"):
        SuiteConfig.model_validate({**given, **wrong})
