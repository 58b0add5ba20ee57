"""Everyone who asks about the course of a run's stages hears what the trainer does."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from stage_cases import objective, small_model

from megarlx.config import Config
from megarlx.planning.stages import job_of_stage
from megarlx.run.assemble import steps_at_tokens, training_stage
from megarlx.run.branch import course_of
from megarlx.run.readiness import beginnings_of_rl
from megarlx.training.trainer import Trainer

NAMES = ("pretraining", "rl", "sft", "warm")  # the last is another SFT
TOKENS = 4 * 32  # of a step of pre-training


def recipe(seed: int) -> dict[str, Any]:
    """One to four stages of any kind that a configuration allows."""
    draw = random.Random(seed)
    stages, seen = [], set()
    for _ in range(draw.randint(1, 4)):
        combine = draw.choice(["single", "alternate", "average", "average"])
        names = draw.sample(NAMES, 1 if combine == "single" else draw.randint(2, 4))
        objectives = {}
        for name in names:
            one = {"lr": 1e-3, "schedule": "linear", "turns": draw.randint(1, 5)}
            one["inherit"] = name in seen and draw.random() < 0.5
            if draw.random() < 0.2:
                one["schedule_steps"] = draw.randint(2, 30)
            objectives[name] = one
        seen |= set(names)
        stage = {"steps": draw.randint(1, 9), "combine": combine, "objectives": objectives}
        if combine == "average":
            stage["sync_every"] = draw.randint(1, 4)
        stages.append(stage)
    return {
        "model": {
            "vocab_size": 97, "hidden_size": 64, "heads": 4, "layers": 2, "intermediate_size": 128,
        },
        "training": {"sequence_length": 32, "sequences_per_step": 4},
        "optimizer": {"lr": 5e-3},
        "data": {"maker": "world", "folder": "world"},
        "rl": {},
        "sft": {},
        "objectives": {"warm": {"sft": {}}},
        "checkpoints": {"save_at_tokens": [TOKENS, 3 * TOKENS - 1, 9 * TOKENS, 10**9]},
        "stages": stages,
    }  # fmt: skip


def walked(trainer: Trainer, steps: int) -> list[tuple[int, list[str], bool, dict[str, float]]]:
    """Of each step that the trainer takes: stage, objectives, whether it averages, rates."""
    found = []
    for _ in range(steps):
        losses, _ = trainer.step()
        found.append((trainer.stage_index, list(losses), trainer.in_sync, trainer.last_rates))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_all_askers_of_the_timeline_agree(seed: int) -> None:
    config = Config.model_validate(recipe(seed))
    made = {name: objective(name) for name in NAMES}
    stages = [training_stage(stage, made) for stage in config.all_stages]  # type: ignore[arg-type]
    steps = walked(Trainer(small_model(), stages), config.steps)

    # Steps of each objective: the trainer's, the plan's, and the length of learning rates' courses.
    for index, stage in enumerate(config.all_stages):
        of_stage = [trained for at, trained, _, _ in steps if at == index]
        averages = sum(average for at, _, average, _ in steps if at == index)
        assert len(of_stage) == stage.steps
        assert stage.times.averages == averages
        jobs = {job.name: job for job in job_of_stage(config, 1, index).all_objectives}
        for name, one in stage.objectives.items():
            taken = sum(name in trained for trained in of_stage)
            assert stage.times.steps_of(name) == taken
            assert jobs[name].share_of_steps == taken / stage.steps
            assert jobs[name].averages_per_step == averages / stage.steps
            rates = [r[name] for at, trained, _, r in steps if at == index and name in trained]
            length = one.schedule_steps or taken
            if rates and not one.inherit and length == taken > 1:
                # Linear, without an end above 0: the last step of the course has the least rate.
                assert rates[0] == 1e-3
                assert rates[-1] == pytest.approx(one.final_lr_fraction * 1e-3, abs=1e-15)
                assert all(a > b for a, b in itertools.pairwise(rates))

    # Where a checkpoint can be written, and where counts of tokens fall.
    in_sync = [0] + [done for done, (*_, average, _) in enumerate(steps, 1) if average]
    for done in range(config.steps + 1):
        assert config.timeline.next_average(done) == min(at for at in in_sync if at >= done)
    reached, tokens = [], 0
    wanted = list(config.checkpoints.save_at_tokens)
    for done, (_, trained, _, _) in enumerate(steps, 1):
        tokens += TOKENS * ("pretraining" in trained)
        while wanted and tokens >= wanted[0]:
            wanted.pop(0)
            reached.append(min(at for at in in_sync if at >= done))
    assert steps_at_tokens(config) == reached

    # When RL begins, and what an excursion that goes on takes over.
    first_stage: dict[str, int] = {}
    for index, stage in enumerate(config.all_stages):
        for name in stage.objectives:
            first_stage.setdefault(name, index)
    begins = {sum(s.steps for s in config.all_stages[: first_stage["rl"]]): ["rl"]} \
        if "rl" in first_stage else {}  # fmt: skip
    assert beginnings_of_rl(config) == begins
    for name in NAMES:
        course = course_of(config, name)
        last = [index for index, s in enumerate(config.all_stages) if name in s.objectives]
        if not last:
            assert course is None
            continue
        one = config.all_stages[last[-1]].objectives[name]
        taken = sum(name in trained for at, trained, _, _ in steps if at == last[-1])
        assert course is not None
        assert course["schedule_steps"] == (one.schedule_steps or taken)


def test_the_course_of_an_excursion_that_goes_on_is_as_long_as_its_parents() -> None:
    """13 steps in turns of 10 and 10 are 10 and 3, not 7 and 7."""
    given = recipe(0)
    both = {name: {"lr": 1e-3, "turns": 10} for name in ("rl", "sft")}
    given["stages"] = [{"steps": 13, "combine": "alternate", "objectives": both}]
    config = Config.model_validate(given)
    found = {name: course_of(config, name) for name in both}
    assert {name: course["schedule_steps"] for name, course in found.items() if course} == {
        "rl": 10,
        "sft": 3,
    }
