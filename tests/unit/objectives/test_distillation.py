"""`distill` as an objective: its loss, its resume, its bounds, in one process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_objectives import TEMPLATE, TOKENIZER, config, distillation
from pydantic import ValidationError
from rl_cases import VOCABULARY, model, prompts

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Group
from megarlx.config.distill import DistillConfig
from megarlx.data.conversations import Conversation, Turn
from megarlx.objectives.distill import Distillation
from megarlx.rollouts.texts import KeptTexts, TextError
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

WORLD = Group.alone("world")
FORWARD = {"kl": "forward", "rollouts": "runs/a"}


def trainer_of(one: Distillation, lr: float = 1e-2) -> Trainer:
    member = TrainedObjective(one, UpdateSettings(weight_decay=0.0), lambda step: lr)
    return Trainer(one.model, [TrainingStage([member], combine="single")])


@pytest.mark.parametrize("kl", [{}, FORWARD], ids=["reverse", "forward"])
def test_the_loss_is_the_mean_divergence_of_what_was_written(kl: dict[str, Any]) -> None:
    given = config(teacher_weights=[1.0, 3.0], temperature=0.8, **kl)
    student = model(dtype=torch.float64)
    one = distillation(given, student)
    one.prepare()
    made = one.current
    assert made is not None
    weights = student.data_parallel.weights.clone()
    found = trainer_of(one, lr=0.0)
    loss = found.global_loss(found.step()[0])["distill"]
    (stage,) = student.stages

    def log_probs(ids: torch.Tensor) -> torch.Tensor:
        logits = stage.logits(stage(ids[None]))[:, :VOCABULARY]
        return (logits / given.temperature).log_softmax(-1)

    divergences = []
    for ids, written in zip(
        made.tokens.split(made.lengths.tolist()),
        made.written.split(made.lengths.tolist()),
        strict=True,
    ):
        with torch.no_grad():
            student.data_parallel.weights.copy_(weights)
            p = log_probs(ids[:-1])[written[1:]]
            for teacher, share in zip(one.teachers, (0.25, 0.75), strict=True):
                student.data_parallel.weights.copy_(teacher.shard)
                q = log_probs(ids[:-1])[written[1:]]
                first, second = (p, q) if given.kl == "reverse" else (q, p)
                divergences.append(share * (first.exp() * (first - second)).sum(-1))
    tokens = int(made.written.sum())
    assert loss == pytest.approx(float(torch.cat(divergences).sum()) / tokens, rel=1e-12)
    assert one.metrics()["distill/kl"] == pytest.approx(loss, rel=1e-12)


def test_a_teacher_that_is_the_student_moves_nothing() -> None:
    student = model(3, torch.float64)
    one = distillation(config(teachers=["t3@1"]), student, seeds=(3,))
    trainer = trainer_of(one)
    before = student.data_parallel.weights.clone()
    loss, report = trainer.step()
    assert abs(trainer.global_loss(loss)["distill"]) < 1e-14
    assert float(report.gradient_norms["distill"]) < 1e-13
    assert (student.data_parallel.weights - before).abs().max() < 1e-6  # Adam of rounding


def test_distilling_comes_closer_to_the_teacher_and_makes_a_rollout_when_it_is_due() -> None:
    one = distillation(config(teachers=["t11@1"], rollout_every_steps=2), model(), seeds=(11,))
    trainer, kls, made = trainer_of(one), [], []
    for _ in range(12):
        trainer.step()
        kls.append(one.metrics()["distill/kl"])
        assert one.current is not None
        made.append(one.current.tokens)
    assert kls[-1] < 0.7 * kls[0]
    new = [a is not b for a, b in itertools.pairwise(made)]
    assert new == [False, True] * 5 + [False]


@pytest.mark.parametrize("kl", [{}, FORWARD], ids=["reverse", "forward"])
@pytest.mark.parametrize("steps", [2, 3])  # inside of a rollout, and at its end
def test_a_run_goes_on_exactly(tmp_path: Path, kl: dict[str, Any], steps: int) -> None:
    first = trainer_of(distillation(config(**kl), model()))
    for _ in range(steps):
        first.step()
    first.save(Saver(tmp_path, WORLD), {}, blocking=True)
    expected = [first.global_loss(first.step()[0]) for _ in range(4)]
    again = trainer_of(distillation(config(**kl), model(8)))
    again.resume(tmp_path / f"iter_{steps:08d}")
    assert [again.global_loss(again.step()[0]) for _ in range(4)] == expected
    assert torch.equal(again.optimizer.master, first.optimizer.master)
    works = (first.objectives["distill"].work, again.objectives["distill"].work)
    assert works[0] == works[1]
    other = trainer_of(distillation(config(**kl), model(), seeds=(11, 13)))
    with pytest.raises(ValueError, match=r"the teachers were .*t12@1.* and are .*t13@1"):
        other.resume(tmp_path / f"iter_{steps:08d}")


def test_what_does_not_go_together_is_named() -> None:
    wrong: dict[str, dict[str, Any]] = {
        "teachers: are none": {"teachers": []},
        "teachers: name 'runs/a'; allowed is RUN@N": {"teachers": ["runs/a"]},
        "teacher_weights: are [1.0] for 2 teachers; one each": {"teacher_weights": [1.0]},
        "rollouts: is missing; it is needed for kl = 'forward'": {"kl": "forward"},
        "rollouts: is 'runs/a'; it is needed for kl = 'forward', and only": {"rollouts": "runs/a"},
        "filter: is for kl = 'forward'": {"filter": {"marked": True}},
    }
    for text, changes in wrong.items():
        with pytest.raises(ValidationError) as error:
            config(**changes)
        assert text in str(error.value)
    usual = DistillConfig(teachers=("runs/rl@40",))
    assert usual.shares == (1.0,)
    assert (usual.prompts_per_rollout, usual.samples_per_prompt) == (16, 4)
    assert (usual.rollout_every_steps, usual.temperature, usual.kl) == (10, 1.0, "reverse")


def test_rollouts_that_are_too_long_are_left_out_and_counted_or_stop_it() -> None:
    word = prompts()[0].question.split()[0]
    made = [
        Conversation((Turn("user", word), Turn("assistant", " ".join([word] * count))))
        for count in (1, 40, 2)
    ]
    given = config(**FORWARD)

    def texts(given: DistillConfig) -> KeptTexts:
        return KeptTexts(given, made, TEMPLATE, TOKENIZER, 24, 5, "teach", torch.device("cpu"))

    assert texts(given).too_long == 1
    drawn, _ = texts(given).next()
    assert int(drawn.lengths.max()) <= 24
    with pytest.raises(TextError, match=r"teach: a rollout has \d+ tokens; allowed are 24; .*skip"):
        texts(given.model_copy(update={"too_long": "stop"}))
