"""Every rank of every layout returns the results of one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit" / "evaluation"))
from evaluated_models import small_model, subject

from megarlx.comm.groups import Mesh
from megarlx.config.evaluation import EvaluationConfig
from megarlx.evaluation.suites import evaluate
from megarlx.rollouts.rewards.process import RewardError

PLAIN = {"max_new_tokens": 6, "questions": 3, "samples": 8, "ks": [1, 8]}
SUITES = EvaluationConfig.model_validate(
    {
        "slots": 16,
        "suites": [
            {
                "name": "p",
                "kind": "pass_at_k",
                "made": "problems",
                **PLAIN,
                "form": "answer_format",
            },
            {"name": "b", "kind": "behaviour", "made": "behaviours", "templated": False, **PLAIN},
            {"name": "c", "kind": "cloze", "made": "facts", "questions": 7},
            {"name": "n", "kind": "perplexity", "made": "stories", "questions": 2},
        ],
    }
)


OF_TABLES = EvaluationConfig.model_validate(
    {"suites": [{"name": "l", "kind": "lookups", "made": "lookups", "questions": 5}]}
)


def evaluated(layout: dict[str, int], run: Path | None) -> list[dict[str, Any]]:
    mesh = Mesh.build(**layout, timeout_seconds=20.0)
    model = small_model(mesh=mesh)
    found = evaluate(subject(model), SUITES, run=run)
    found += evaluate(subject(model, tables=True), OF_TABLES, run=run)
    return [{**result, "seconds": 0} for result in found]


@pytest.mark.parametrize(
    "layout", [{"dp": 4}, {"tp": 2}, {"pp": 2}, {"pp": 2, "dp": 2}, {"dp": 2, "tp": 2}]
)
def test_every_rank_has_the_results_of_one_process(
    run: Callable, layout: dict[str, int], tmp_path: Path
) -> None:
    """With dp 4 a rank has no question at all."""
    (alone,) = run(1, evaluated, {}, None)
    world = 1
    for size in layout.values():
        world *= size
    ranks = run(world, evaluated, layout, tmp_path)
    assert all(rank == ranks[0] for rank in ranks)
    for one, other in zip(alone, ranks[0], strict=True):
        assert one["settings"] == other["settings"]
        assert [i["id"] for i in one["items"]] == [i["id"] for i in other["items"]]
        for a, b in zip(one["items"], other["items"], strict=True):
            for key in ("nll", "margin", "probability"):
                assert a.get(key) == pytest.approx(b.get(key), abs=1e-4)
        for key, value in one["metrics"].items():
            # a sample in a hundred may differ between tensor-parallel sizes
            assert other["metrics"][key] == pytest.approx(value, abs=0.05)
    again = run(world, evaluated, layout, tmp_path)
    assert again == ranks, "finished suites were not taken from their files"


def broken(layout: dict[str, int]) -> str:
    mesh = Mesh.build(**layout, timeout_seconds=20.0)
    reward = {"function": "rewards_for_tests:broken", "workers": 0}
    suite = SUITES.suites[0].model_dump() | {"rewards": [reward]}
    config = EvaluationConfig.model_validate({"suites": [suite]})
    try:
        evaluate(subject(small_model(mesh=mesh)), config)
    except RewardError as error:
        return str(error)
    return ""


def test_a_broken_reward_stops_every_rank(run: Callable) -> None:
    for said in run(4, broken, {"tp": 2, "dp": 2}):
        assert "failed on" in said
