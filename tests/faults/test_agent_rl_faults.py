"""Learning goes on while an environment misbehaves, up to a limit; then the run names it."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "objectives"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "rollouts"))
from agent_cases import agent_config, agents, model
from rl_cases import trainer_of

from megarlx.objectives.policy import Reinforcement
from megarlx.rollouts.environments.process import BrokenEnvironment

TRAP = "misbehaving_environments:Trap"
KINDS = {
    "hang": "timeout", "crash": "crash", "raise": "error", "none": "wrong_shape",
    "bytes": "wrong_shape", "nan": "not_finite", "long": "too_long",
}  # fmt: skip


def trapped(bad: str, allowed_failures: float) -> Reinforcement:
    limits: dict[str, Any] = {
        "function": TRAP,
        "max_turn_tokens": 4,
        "options": {"trap": "w2", "bad": bad},
        "workers": 1,
        "episodes_per_call": 8,
        "time_limit_seconds": 0.3,
        "allowed_failures": allowed_failures,
    }
    return agents(agent_config(2, limits=limits, prompts_per_step=2), model())


@pytest.mark.parametrize("bad", KINDS)
def test_a_bad_episode_is_counted_has_no_advantage_and_the_others_are_learned_from(
    bad: str,
) -> None:
    with closing(trapped(bad, allowed_failures=0.9)) as one:
        trainer = trainer_of(one)
        before = [t.clone() for t in trainer.optimizer.shards.shards.values()]
        trainer.step()
    lost = one.metrics()["rl/environment_failures_Trap"]
    made = one.current
    assert made is not None
    unknown = made.rewards.isnan()
    assert 0 < lost == int(unknown.sum()) < unknown.numel()
    after = list(trainer.optimizer.shards.shards.values())
    assert all(t.isfinite().all() for t in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("bad", ["hang", "raise", "long"])
def test_above_the_limit_the_run_stops_and_names_environment_and_reason(bad: str) -> None:
    said = rf"^environment {TRAP}: lost \d of 8 episodes; allowed are 1%. The first \({KINDS[bad]}"
    with closing(trapped(bad, allowed_failures=0.01)) as one:
        trainer = trainer_of(one)
        with pytest.raises(BrokenEnvironment, match=said):
            trainer.step()
