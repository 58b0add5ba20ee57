"""RL, evaluation, the readiness probe and agents show a reward the same text of the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from environments_for_tests import Letters
from evaluated_models import TEMPLATE, WORLD, small_model

from megarlx.config.evaluation import SuiteConfig
from megarlx.config.objectives import RlConfig
from megarlx.data.prompts import FewShot, PromptData, PromptKeys, read_prompts
from megarlx.evaluation.questions import questions_of
from megarlx.evaluation.readiness import readiness_suite
from megarlx.evaluation.sampled import play
from megarlx.generation.engine import Engine
from megarlx.generation.requests import SamplingSettings
from megarlx.generation.stop import text_of
from megarlx.rollouts.player import Player
from megarlx.rollouts.question_game import QuestionGame
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rewards.sample import Sample
from megarlx.rollouts.rollout import Sampler

TOKENIZER = WORLD.tokenizer()
STOPS = ("ann", "8")  # words of the world; the model is untrained and says anything
NEW, SAMPLES = 12, 8
seen: list[Sample] = []
acted: list[str] = []


def watching(samples: list[Sample]) -> list[float]:
    seen.extend(samples)
    return [0.0] * len(samples)


class Heard(Letters):
    def step(self, action: str) -> Any:
        acted.append(action)
        return super().step(action)


def read(reward: str) -> list[dict[str, Any]]:
    return [{"function": f"test_one_text:{reward}", "workers": 0}]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": name, "answer": "7", "id": f"test/{name}"} for name in ("tom", "eva")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def policy() -> RlConfig:
    return RlConfig.model_validate(
        {
            "prompts_per_step": 2, "samples_per_prompt": SAMPLES, "max_completion_tokens": NEW,
            "slots": 16, "stop_strings": STOPS, "rewards": read("watching"),
        }
    )  # fmt: skip


def rl(path: Path) -> None:
    given, model = policy(), small_model()
    decode = TOKENIZER.decode_sampled
    engine = Engine.of(model, slots=16, longest=48, detokenize=decode)
    data = PromptData(read_prompts(path, PromptKeys()), TEMPLATE, TOKENIZER, 1, name="rl")
    game = QuestionGame(Rewards(given.rewards), NEW, model.mesh)
    Sampler(given, Player(lambda: engine, game, TOKENIZER), data, model.mesh.dp, 1).rollout()


def evaluation(path: Path) -> None:
    suite = {
        "name": "s", "kind": "pass_at_k", "path": str(path), "samples": SAMPLES,
        "temperature": 1.0, "top_p": 1.0, "max_new_tokens": NEW, "stop_strings": STOPS,
        "rewards": read("watching"), "ks": [1],
    }  # fmt: skip
    sampled(SuiteConfig.model_validate(suite))


def readiness(path: Path) -> None:
    sampled(
        readiness_suite(
            "rl", policy(), prompts=2, path=str(path), max_prompt_tokens=30, examples=None, shown=0
        )
    )


def sampled(suite: SuiteConfig) -> None:
    asked = questions_of(suite, None)
    play(small_model(), TOKENIZER, TEMPLATE, suite, asked, FewShot(), seed=1)


def cut(text: str) -> str:
    """Up to the first stop string, by the definition."""
    return min((text.split(stop)[0] for stop in STOPS), key=len)


@pytest.mark.parametrize("asker", [rl, evaluation, readiness])
def test_a_reward_sees_one_text(asker: Any, questions: Path) -> None:
    seen.clear()
    asker(questions)
    assert len(seen) >= 2 * SAMPLES
    assert {sample.finish_reason for sample in seen} >= {"stop_string", "length"}
    for sample in seen:
        assert sample.completion == cut(sample.completion)


def test_an_environment_hears_the_same_text(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"question": "tom", "task": {"name": "tom"}, "id": "test/0"}) + "\n")
    environment = {
        "function": "test_one_text:Heard", "max_turns": 3, "max_turn_tokens": NEW,
        "max_episode_tokens": 90, "workers": 0,
    }  # fmt: skip
    suite = {
        "name": "s", "kind": "agent", "path": str(path), "samples": 16, "temperature": 1.0,
        "stop_strings": STOPS, "environment": environment,
    }  # fmt: skip
    acted.clear()
    sampled(SuiteConfig.model_validate(suite))
    assert len(acted) > 16
    assert all(action == cut(action) for action in acted)
    assert min(map(len, acted)) < max(map(len, acted))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([1, 2, 0], "a b"),  # the token that ends it is no text
        ([1, 2], "a b"),
        ([1, 3, 2], "a "),  # up to the first stop string, here c
        ([3, 1, 0], ""),
        ([2, 4, 3], "b"),  # the earlier of two
        ([], ""),
    ],
)
def test_text_of_leaves_out_what_ended_it(tokens: Sequence[int], said: str) -> None:
    sampling = SamplingSettings(stop_tokens=(0,), stop_strings=("c", " d"))

    def decode(ids: Sequence[int]) -> str:
        return " ".join("eabcd"[i] for i in ids)

    assert text_of(tokens, sampling, decode) == said
