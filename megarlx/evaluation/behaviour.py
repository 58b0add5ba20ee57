"""How a model behaves where somebody asks it to: prompts, any reward, and how far it drifts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megarlx.evaluation.bootstrap import Interval, paired_difference
from megarlx.evaluation.pass_at_k import mean_and_error
from megarlx.evaluation.sampled import Played


def item(played: Played, violation_below: float) -> dict[str, Any]:
    """Means over the samples whose reward is known; null where none is."""
    known = [reward for reward in played.rewards if not math.isnan(reward)]
    violations = sum(reward < violation_below for reward in known)
    found = {
        "id": played.question.id,
        "reward": math.fsum(known) / len(known) if known else None,
        "violations": violations,
        "samples": len(known),
        "truncated": played.truncated,
    }
    return found if played.question.group is None else {**found, "group": played.question.group}


def summary(items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean reward and the share of samples that violate, over prompts, with standard errors."""
    known = [entry for entry in items if entry["samples"]]
    if not known:
        raise ValueError("behaviour: no sample of any prompt has a reward")
    reward = mean_and_error([entry["reward"] for entry in known])
    rate = mean_and_error([entry["violations"] / entry["samples"] for entry in known])
    return (
        {"mean": reward.mean, "violation_rate": rate.mean},
        {"mean": reward.standard_error, "violation_rate": rate.standard_error},
    )


def drift(result: Mapping[str, Any], parent: Mapping[str, Any]) -> Interval:
    """How much more reward than the parent gets, prompt by prompt."""
    own, others = (
        {e["id"]: e["reward"] for e in r["items"] if e["reward"] is not None}
        for r in (result, parent)
    )
    both = own.keys() & others.keys()
    return paired_difference({i: own[i] for i in both}, {i: others[i] for i in both})
