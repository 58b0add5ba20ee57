"""Plans know what update rules keep and what combinations hold and send, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan_stages import CONFIG, IN_REPLICAS, USUAL

from megarlx.config import load_config
from megarlx.planning.dry_run import build, dry_run, fake_world, trainer_of
from megarlx.planning.job import Job
from megarlx.planning.memory import rank_memory
from megarlx.planning.report import compare, differing
from megarlx.planning.stages import job_of_stage


class Mean:
    """A rule with one tensor of state, which sees the embedding whole."""

    state = ("mean",)

    def __init__(self, settings: Any) -> None:
        pass

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        return name == "embedding.weight"

    def delta(self, parts: Any, gradient: Any, state: Any, **numbers: Any) -> Any:
        return parts.on_whole(gradient, lambda tensor: -tensor)


MEAN, MUON = f"{__name__}:Mean", "muon"
LOCAL = {"sync": 2}
CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # changes, combination, rule of rl, rule of sft
    "muon": ({}, "weighted_sum", MUON, "adamw"),
    "muon, tensor": ({"tensor": 2}, "weighted_sum", MUON, MUON),
    "another rule": ({}, "weighted_sum", MEAN, "adamw"),
    "another rule, replicas": (IN_REPLICAS, "weighted_sum", MEAN, "adamw"),
    "projection": ({}, "projection", "adamw", "adamw"),
    "projection, replicas": (IN_REPLICAS, "projection", "adamw", "adamw"),
    "projection, replicas, tensor, muon": (
        {**IN_REPLICAS, "tensor": 2},
        "projection",
        "adamw",
        MUON,
    ),
    "projection, local steps": (LOCAL, "projection", "adamw", "adamw"),
    "projection, local steps, replicas": (
        {**IN_REPLICAS, **LOCAL},
        "projection",
        "adamw",
        "adamw",
    ),
    "projection, gradients": ({"of": "gradients"}, "projection", MUON, MUON),
    "projection, gradients, replicas": (
        {**IN_REPLICAS, "of": "gradients"},
        "projection",
        "adamw",
        "adamw",
    ),
    "signs, replicas": (IN_REPLICAS, "sign_agreement", "adamw", "adamw"),
}


def job_of(tmp_path: Path, case: str, gpus: int, stage: int = 0) -> Job:
    changes, combination, *rules = CASES[case]
    text = CONFIG.format(**{**USUAL, **changes})
    text = text.replace("\nof = ", f'\ncombination = "{combination}"\nof = ')
    head, *stages = text.split("[[stages]]")
    for name, rule in zip(("rl", "sft"), rules, strict=True):
        said = f'objectives.{name}]\nrule = "{rule}"'
        stages = [one.replace(f"objectives.{name}]", said) for one in stages]
    path = tmp_path / "rules.toml"
    path.write_text("[[stages]]".join([head, *stages]))
    return job_of_stage(load_config(path), gpus, stage)


def held_by(job: Job, rank: int) -> tuple[int, list[torch.Tensor], torch.Tensor]:
    """Bytes of the real optimizer's tensors on the meta device; its states; its buffers."""
    device = torch.device("meta")
    with fake_world(rank, job.gpus):
        trainer = trainer_of(job, build(job, device), device)
    optimizer, parallel = trainer.optimizer, trainer.model.data_parallel
    states = [shard for shards in optimizer.kept.shards.values() for shard in shards.values()]
    tensors = [
        *(parallel.weights, parallel.gradients, optimizer.master, optimizer.masters.out),
        *(optimizer.combiner.buffers, *optimizer.gradients.values()),
        *(*optimizer.masters.locals.values(), *states),
    ]
    found = {id(one): one.nbytes for one in tensors if one is not None}
    return sum(found.values()), states, optimizer.combiner.buffers


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize("case", CASES)
def test_plans_count_rules_and_combinations(tmp_path: Path, case: str, gpus: int) -> None:
    job = job_of(tmp_path, case, gpus)
    for rank in (0, job.gpus - 1):  # of the first replica and of the last
        held, _, _ = held_by(job, rank)
        assert rank_memory(job, rank).persistent == held
        assert differing(compare(dry_run(job, rank), job)) == []


def test_states_and_shards_are_those_of_the_rule_and_the_combination(tmp_path: Path) -> None:
    """Counted by hand: n objectives cost n shards in place of what a sum needs."""
    _, states, buffers = held_by(job_of(tmp_path, "another rule", 4), 0)
    assert (len(states), len(buffers)) == (1 + 2, 0)
    assert len(held_by(job_of(tmp_path, "projection", 4), 0)[2]) == 2
    assert len(held_by(job_of(tmp_path, "projection, replicas", 4), 0)[2]) == 2
    assert len(held_by(job_of(tmp_path, "projection, local steps", 4), 0)[2]) == 0
    # In replicas each has the state of its own rule only.
    job = job_of(tmp_path, "another rule, replicas", 4)
    assert [len(held_by(job, rank)[1]) for rank in (0, 3)] == [1, 2]


def test_a_state_that_waits_is_counted_by_its_rule(tmp_path: Path) -> None:
    """The stage between trains pre-training; RL goes on after it, by its own rule."""
    one, two = (
        rank_memory(job_of(tmp_path, case, 4, stage=1), 0).optimizer
        for case in ("another rule", "projection")
    )
    job = job_of(tmp_path, "projection", 4, stage=1)
    assert two - one == job.sizes(0).flat // 4 * 4
