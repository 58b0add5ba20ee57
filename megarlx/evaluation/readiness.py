"""Whether a model is ready for RL: how often a group of its samples has anything to teach.

A group-relative advantage is zero where all samples of a group are right, or all are wrong. The
probe draws from the base as the excursion will: same prompts, same temperature, no examples.
"""

from __future__ import annotations

from megarlx.config.evaluation import SuiteConfig
from megarlx.evaluation.pass_at_k import Estimate, Pool, informative_share, mean_and_error


def informative_groups(pool: Pool, group_size: int) -> Estimate:
    """The share of groups of that size that hold a right and a wrong sample, over questions."""
    pairs = zip(pool.samples, pool.correct, strict=True)
    return mean_and_error([informative_share(n, c, group_size) for n, c in pairs])


def readiness_suite(suite: SuiteConfig, *, temperature: float, group_size: int) -> SuiteConfig:
    """The probe that goes with a pass@k suite over the prompts that RL will train on."""
    changes = {
        "name": f"{suite.name}-readiness",
        "temperature": temperature,
        "few_shot": 0,
        "few_shot_trained": 0,
        "group_size": group_size,
        "samples": max(suite.samples, group_size),
    }
    return SuiteConfig.model_validate({**suite.model_dump(), **changes})
