"""A run warns once where it learns nothing or leaves its running band, and is quiet otherwise."""

from __future__ import annotations

import random

import pytest

from megarlx.config import Config
from megarlx.run.watch import ENOUGH, IN_A_ROW, Watch

MODEL = {"vocab_size": 64, "hidden_size": 8, "layers": 1, "heads": 1, "intermediate_size": 16}
CONFIG = Config.model_validate(
    {
        "model": {"family": "olmo2", "max_sequence_length": 32, **MODEL},
        "training": {"sequence_length": 16, "steps": 4},
        "data": {"tokenizer": "bytes", "sources": [{"name": "a", "prefix": "a"}]},
        "template": {"user": "{content}"},
        "rl": {"prompts": "p.jsonl"},
        "objectives": {"second": {"rl": {"prompts": "q.jsonl"}}},
    }
)


def said(logs: list[dict[str, float]], stage: int = 0) -> list[tuple[int, str]]:
    watch = Watch(CONFIG)
    return [(at, text) for at, values in enumerate(logs) for text in watch(stage, values)]


def course(seed: int, logs: int) -> list[dict[str, float]]:
    """Of a pre-training that goes well: a falling loss and gradient norms, both with noise."""
    draw = random.Random(seed)
    return [
        {
            "loss/pretraining": 2 + 6 / (at + 1) + draw.gauss(0, 0.05),
            "grad_norm/pretraining": (0.5 + 4 / (at + 1)) * draw.lognormvariate(0, 0.15),
        }
        for at in range(logs)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_goes_well_is_not_warned_of(seed: int) -> None:
    assert said(course(seed, 400)) == []


@pytest.mark.parametrize("at", [ENOUGH, 30, 200])
@pytest.mark.parametrize("key", ["loss/pretraining", "grad_norm/pretraining"])
def test_a_value_above_its_band_is_warned_of_once_with_how_far_it_is(key: str, at: int) -> None:
    logs = course(0, 220)
    for step in range(at, at + 3):
        logs[step][key] = 50.0
    (where, text), *more = said(logs)
    assert where == at
    assert text.startswith(f"{key} is 50, ")
    over, top = float(text.split()[3]), float(text.rpartition(" ")[2])
    assert over + top == pytest.approx(50, rel=0.01)
    assert more == []


def test_a_band_is_of_one_stage_and_follows_a_new_level() -> None:
    low, high = ({"loss/pretraining": value} for value in (1.0, 5.0))
    watch = Watch(CONFIG)
    assert [watch(0, low) for _ in range(20)] == [[]] * 20
    assert [watch(1, high) for _ in range(20)] == [[]] * 20  # another stage
    assert len(said([low] * 20 + [high] * 40)) == 1
    assert len(said(([low] * 20 + [high]) * 3)) == 3  # it was back in between


def test_a_loss_that_is_no_number_is_warned_of_at_once() -> None:
    assert said([{"loss/pretraining": float("nan")}] * 3) == [(0, "loss/pretraining is nan")]


@pytest.mark.parametrize("name", ["rl", "second"])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_without_a_signal_are_warned_of_once_they_last(name: str, reward: float) -> None:
    before = "rl/" if name == "rl" else f"rl/{name}/"

    def log(informative: float) -> dict[str, float]:
        return {
            f"loss/{name}": 0.0,
            f"grad_norm/{name}": float(informative > 0),
            f"{before}informative_groups": informative,
            f"{before}reward": reward,
        }

    dull, good = log(0.0), log(0.5)
    assert said([dull, dull, good] * 5) == []
    (at, text), *more = said([good, *[dull] * 10])
    assert at == IN_A_ROW
    assert text.startswith(f"{name} has had no informative group in the last {IN_A_ROW} logs")
    assert f"(mean reward {reward:.3f})" in text
    assert more == []  # of the gradients, which are 0 for that reason, nothing more is said


def test_gradients_of_0_are_warned_of_once_they_last() -> None:
    still = {"loss/pretraining": 2.0, "grad_norm/pretraining": 0.0}
    moving = {**still, "grad_norm/pretraining": 1.0}
    assert said([still, still, moving] * 5) == []
    expected = "grad_norm/pretraining was 0 in the last 3 logs; it learns nothing"
    assert said([still] * 20) == [(IN_A_ROW - 1, expected)]


def test_a_policy_loss_has_no_band() -> None:
    logs = [{"loss/rl": 1e-9 * at, "grad_norm/rl": 1.0} for at in range(20)]
    assert said([*logs, {"loss/rl": 0.5, "grad_norm/rl": 1.0}]) == []
