"""Whether groups can teach: against counting the groups that can be drawn."""

import itertools

import pytest

from megarlx.config.evaluation import SuiteConfig
from megarlx.evaluation.pass_at_k import Pool
from megarlx.evaluation.readiness import informative_groups, readiness_suite


def test_informative_groups_are_those_with_both_outcomes() -> None:
    pool = Pool((6, 6, 6, 6), (0, 1, 3, 6))
    shares = []
    for correct in pool.correct:
        groups = list(itertools.combinations(range(6), 3))
        shares.append(sum(0 < sum(i < correct for i in g) < 3 for g in groups) / len(groups))
    assert informative_groups(pool, 3).mean == pytest.approx(sum(shares) / 4)
    assert (shares[0], shares[3]) == (0, 0)


def test_the_probe_draws_as_training_will() -> None:
    suite = SuiteConfig(
        name="math",
        kind="pass_at_k",
        path="q.jsonl",
        few_shot=8,
        few_shot_path="d.jsonl",
        samples=8,
    )
    probe = readiness_suite(suite, temperature=1.0, group_size=16)
    assert (probe.temperature, probe.few_shot, probe.samples) == (1.0, 0, 16)
    assert (probe.name, probe.group_size) == ("math-readiness", 16)
