"""How often an answer has the form that is asked for, and how often it is then right.

From the same samples as pass@k: with m the share of samples in the form, and a the share of these
that are correct, pass@1 is m · a where no other sample is correct.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megarlx.config.reward import RewardConfig
from megarlx.evaluation.pass_at_k import mean_and_error
from megarlx.rollouts.episodes import Episode
from megarlx.rollouts.question_game import FORM

FULL = 1.0 - 1e-6  # of the reward: a sample with all of it has the form


def reward_of(form: str) -> RewardConfig:
    """answer_format only looks at text, in time that its length bounds: no process of its own."""
    return RewardConfig(function=form, workers=0 if form == "answer_format" else 1)


def of_item(episodes: Sequence[Episode], rewards: Sequence[float], correct_from: float) -> Any:
    """What an item says of its samples; a form that is not known is none."""
    marked = [episode.turns[0].info[FORM] >= FULL for episode in episodes]
    right = (has and reward >= correct_from for has, reward in zip(marked, rewards, strict=True))
    return {"marked": sum(marked), "marked_correct": sum(right)}


def summary(items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """m and a with their standard errors over questions; no a where no sample has the form."""
    shares = [item["marked"] / item["samples"] for item in items]
    right = [item["marked_correct"] / item["samples"] for item in items]
    m = mean_and_error(shares)
    metrics, errors = {"marked": m.mean}, {"marked": m.standard_error}
    if m.mean > 0:
        a = metrics["right_of_marked"] = math.fsum(right) / math.fsum(shares)
        # Of a ratio of means, by its linear part.
        away = mean_and_error([r - a * share for r, share in zip(right, shares, strict=True)])
        errors["right_of_marked"] = away.standard_error / m.mean
    return metrics, errors
