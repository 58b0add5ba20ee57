"""Several weighted rewards of the same samples, and what happens to those that fail."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megarlx.comm.collectives import all_reduce_, gather_values
from megarlx.comm.groups import Group
from megarlx.config.reward import RewardConfig
from megarlx.rollouts.rewards.process import Failure, Outcome, RewardError, RewardPool
from megarlx.rollouts.rewards.sample import Sample

SHOWN = 300  # characters of a sample in an error


@dataclass(frozen=True)
class Scored:
    """NaN is a reward that is not known.

    A total is the weighted sum of the rewards that had something to say; it is not known if none
    had, or if one failed.
    """

    totals: list[float]
    parts: dict[str, list[float]]  # of each reward, unweighted
    failures: list[Failure]

    def metrics(self) -> dict[str, tuple[float, int]]:
        """(sum, count) of each metric, so that ranks can add theirs up before dividing."""
        found = {"rl/reward": _sum_and_count(self.totals)}
        for label, values in self.parts.items():
            found[f"rl/reward_{label}"] = _sum_and_count(values)
        failed = Counter(failure.reward for failure in self.failures)
        for label in self.parts:
            found[f"rl/reward_failures_{label}"] = (float(failed[label]), 1)
        return found


def _sum_and_count(values: Sequence[float]) -> tuple[float, int]:
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known), len(known)


class Rewards:
    """Up to the share `allowed_failures` of the samples of a `score` may fail in each reward."""

    def __init__(self, configs: Sequence[RewardConfig], allowed_failures: float = 0.1) -> None:
        labels = Counter(config.label for config in configs)
        if not configs or max(labels.values()) > 1:
            names = ", ".join(config.label for config in configs) or "none"
            raise RewardError(f"rewards need different names, and at least one; given: {names}")
        self.configs = {config.label: config for config in configs}
        self.allowed_failures = allowed_failures
        self._pools = {config.label: RewardPool(config) for config in configs}

    def start(self, group: Group, *, here: bool = True) -> None:
        """Before there are samples, on the ranks that score (`here`); all of the group call it."""
        problem = ""
        try:
            for pool in self._pools.values() if here else ():
                pool.start()
        except RewardError as error:
            problem = str(error)
            self.close()
        _stop_together(problem, group)

    def score(self, samples: list[Sample], group: Group | None = None) -> Scored:
        """With a group, all its ranks call this together, and stop together."""
        outcomes, problem = {}, ""
        try:
            outcomes = {label: pool.score(samples) for label, pool in self._pools.items()}
        except RewardError as error:  # a reward that cannot be started
            problem = str(error)
        _stop_together(problem, group)
        failures = [f for outcome in outcomes.values() for f in outcome.failures.values()]
        self._stop_if_too_many(failures, len(samples), group)
        if samples and not failures and _nothing_said(outcomes):
            names = ", ".join(config.function for config in self.configs.values())
            warnings.warn(
                f"reward {names}: None for each of {len(samples)} samples: there is nothing to "
                "learn from them",
                stacklevel=2,
            )
        totals = []
        for at in range(len(samples)):
            known = [
                self.configs[label].weight * value
                for label, outcome in outcomes.items()
                if (value := outcome.values[at]) is not None
            ]
            lost = any(at in outcome.failures for outcome in outcomes.values())
            totals.append(math.nan if lost or not known else math.fsum(known))
        parts = {
            label: [math.nan if value is None else value for value in outcome.values]
            for label, outcome in outcomes.items()
        }
        return Scored(totals, parts, failures)

    def _stop_if_too_many(self, failures: list[Failure], samples: int, group: Group | None) -> None:
        counts = Counter(failure.reward for failure in failures)
        table = torch.tensor([*(counts[label] for label in self.configs), samples])
        if group is not None:
            table = all_reduce_(table.to(torch.int64), group)
        *failed, total = table.tolist()
        problem = ""
        for label, count in zip(self.configs, failed, strict=True):
            if problem or count <= self.allowed_failures * total:
                continue
            problem = (
                f"reward {self.configs[label].function}: failed on {count} of {total} samples; "
                f"allowed are {self.allowed_failures:.0%}"
            )
            mine = next((f for f in failures if f.reward == label), None)
            if mine is not None:
                problem += f". The first ({mine.kind}: {mine.detail}) had {_shown(mine.sample)}"
        _stop_together(problem, group)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _nothing_said(outcomes: Mapping[str, Outcome]) -> bool:
    return all(value is None for outcome in outcomes.values() for value in outcome.values)


def _stop_together(problem: str, group: Group | None) -> None:
    """The most that any rank has to say, on all of them."""
    if group is not None:
        problem = max(gather_values(problem, group), key=len)
    if problem:
        raise RewardError(problem)


def _shown(sample: Sample) -> str:
    return ", ".join(
        f"{name} {str(getattr(sample, name))[:SHOWN]!r}"
        for name in ("prompt", "completion", "reference")
    )
