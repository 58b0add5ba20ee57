"""Whether a model is ready for RL: how often a group of its samples has anything to teach.

A group-relative advantage is zero where all samples of a group have the same reward. The
probe draws as RL will: its prompts and examples, its temperature, its groups, its first reward.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megarlx.config.evaluation import SuiteConfig
from megarlx.config.objectives import RlConfig
from megarlx.evaluation.pass_at_k import Estimate, informative_share, mean_and_error

PROBE = "-readiness"  # ends the name of such a suite, after the objective's
EQUAL_PLACES = 6  # decimals to which rewards are compared


def equal_rewards(rewards: Sequence[float]) -> list[int]:
    """How many have each of the rewards that are known (not NaN), the lowest first."""
    counts = Counter(round(reward, EQUAL_PLACES) for reward in rewards if math.isfinite(reward))
    return [counts[reward] for reward in sorted(counts)]


def informative_groups(items: Sequence[Mapping[str, Any]], group_size: int) -> Estimate:
    """The share of groups of that size that hold two different rewards, over questions; of items
    without `alike`, as those of agents, that hold a right and a wrong sample."""
    return mean_and_error([informative_share(i["samples"], _alike(i), group_size) for i in items])


def _alike(item: Mapping[str, Any]) -> Sequence[int]:
    wrong = item["samples"] - item["correct"]
    alike: Sequence[int] = item.get("alike", (item["correct"], wrong))
    return alike


def readiness_suite(
    name: str,
    rl: RlConfig,
    *,
    prompts: int,
    path: str,
    max_prompt_tokens: int | None = None,
    examples: str | None = None,
    shown: int = 0,
) -> SuiteConfig:
    """The probe of an objective on the first `prompts` of the file `path`, each with the `shown`
    examples of the file `examples` before it."""
    group = rl.samples_per_prompt
    common: dict[str, Any] = {
        "name": f"{name}{PROBE}",
        "path": path,
        "template": rl.template,
        "question_key": rl.question_key,
        "answer_key": rl.answer_key,
        "questions": prompts,
        "samples": group,
        "group_size": group,
        "ks": sorted({1, *(k for k in (8, 32) if k < group), group}),
        "generator": rl.generator,
        "temperature": rl.temperature,
        "top_p": rl.top_p,
        "stop_strings": rl.stop_strings,
    }
    if rl.environment is not None:
        played = {"kind": "agent", "environment": rl.environment.model_dump()}
        return SuiteConfig.model_validate(common | played)
    first = rl.rewards[0].model_copy(update={"weight": 1.0})
    own: dict[str, Any] = {
        "kind": "pass_at_k",
        "rewards": [first.model_dump()],
        "max_new_tokens": rl.max_completion_tokens,
        "max_prompt_tokens": max_prompt_tokens,
    }
    if examples is not None:
        own |= {"few_shot": shown, "few_shot_trained": shown, "few_shot_path": examples}
        own |= {"few_shot_separator": "\n\n"}  # as in RL's prompts
    return SuiteConfig.model_validate(common | own)
