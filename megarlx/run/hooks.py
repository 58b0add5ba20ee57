"""What a run does beside its steps: guard, log, validate, evaluate, save."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_, gather_values
from megarlx.config.evaluation import EvaluationConfig
from megarlx.config.objectives import PRETRAINING, RlConfig
from megarlx.evaluation.beforehand import check_files
from megarlx.evaluation.interface import Subject
from megarlx.evaluation.results import Result, samples_path
from megarlx.evaluation.suites import Parent as EvaluatedParent
from megarlx.evaluation.suites import evaluate, metrics_of
from megarlx.objectives.supervised import Supervised
from megarlx.run.assemble import Run
from megarlx.run.costs import Costs, peak_flop_per_second
from megarlx.run.directory import RunError
from megarlx.run.finite import Flags, FoundInf
from megarlx.run.made import made_for
from megarlx.run.messages import headline
from megarlx.run.screen import SHOWN_SAMPLES, Screen
from megarlx.run.tokenizer import template_of, templates_of
from megarlx.run.watch import Watch
from megarlx.training.metrics import read_metrics

SHOWN_METRICS = 6  # in the line of an evaluation
LARGEST_LOSS = 700.0  # whose perplexity is a number


class TrainingError(RuntimeError):
    """Training cannot go on: which step, which objective, what went wrong."""


class Guard:
    """Stops a run whose gradients stay not finite, or whose data replicas differ."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.skipped = 0
        self._in_a_row: dict[str, int] = dict.fromkeys(run.trainer.objectives, 0)
        self._found_inf = FoundInf(run.device)

    def after_step(self, step: int, found_inf: Mapping[str, Tensor], *, last: bool) -> None:
        self._check(self._found_inf.put(step, found_inf))
        if last:
            self._check(self._found_inf.last())

    def _check(self, flags: Flags | None) -> None:
        if flags is None:
            return
        allowed = self.run.config.logging.skipped_updates_allowed
        for name, skipped in flags.skipped.items():
            self.skipped += skipped
            self._in_a_row[name] = self._in_a_row[name] + 1 if skipped else 0
            if self._in_a_row[name] > allowed:
                where = gather_values(self.run.trainer.first_non_finite(name), self.run.mesh.world)
                bad = next((place for place in where if place), "no single parameter")
                raise TrainingError(
                    f"step {flags.step}: the gradient of '{name}' is not finite, "
                    f"{self._in_a_row[name]} steps in a row; first in {bad}. "
                    f"logging.skipped_updates_allowed is {allowed}"
                )

    def compare_replicas(self) -> None:
        """The weights of data replicas are the same bits, or something has gone wrong for good."""
        group = self.run.mesh.data
        if group.size == 1:
            return
        weights = self.run.trainer.model.data_parallel.weights
        raw = weights.detach().cpu().view(torch.uint8).numpy()
        digests = gather_values(hashlib.blake2b(raw.data, digest_size=16).hexdigest(), group)
        different = [group.ranks[i] for i, d in enumerate(digests) if d != digests[0]]
        if different:
            raise TrainingError(
                f"step {self.run.trainer.steps_done}: the weights of rank "
                f"{', '.join(map(str, different))} differ from those of rank {group.ranks[0]}, "
                "though they are replicas; go on from a checkpoint before this step"
            )


@dataclass(frozen=True)
class _Trained:
    """An objective's steps since the log before, on the device until they are logged."""

    loss: Tensor  # the sum over the steps
    gradient_norm: Tensor  # likewise
    learning_rate: float  # of the last
    steps: int = 1

    def before(self, last: _Trained) -> _Trained:
        loss, norm = self.loss + last.loss, self.gradient_norm + last.gradient_norm
        return _Trained(loss, norm, last.learning_rate, self.steps + 1)


class StepLog:
    """Logs what every objective did since the log before: objectives may take turns. Of policies
    every step is logged, of others the mean of the steps in between."""

    def __init__(self, run: Run, costs: Costs, guard: Guard, screen: Screen) -> None:
        self.run, self.costs, self.guard, self.screen = run, costs, guard, screen
        self.watch = Watch(run.config)
        objectives = run.config.named_objectives
        self.policies = {name for name, one in objectives.items() if isinstance(one, RlConfig)}
        self._recent: dict[str, _Trained] = {}
        self._pace: float | None = None  # seconds of a step, a running mean
        self._since = (time.perf_counter(), run.trainer.steps_done)
        self._peak = peak_flop_per_second(run.device) * run.mesh.world.size

    def record(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        rates = self.run.trainer.last_rates
        for name, loss in losses.items():
            last, before = _Trained(loss, norms[name], rates[name]), self._recent.get(name)
            averaged = before is not None and name not in self.policies
            self._recent[name] = before.before(last) if averaged and before else last

    def write_policies(self, names: Iterable[str]) -> None:
        """The last step of those that are policies, between two logs; called by all ranks."""
        recent = {name: self._recent[name] for name in names if name in self.policies}
        if recent:
            values = self._trained(recent)
            values |= self.run.trainer.replicas.metrics(recent)
            if self.screen.writer is not None:
                writer, done = self.screen.writer, self.run.trainer.steps_done
                writer.scalars(done, values, self.costs.trunk_tokens)

    def _trained(self, recent: Mapping[str, _Trained]) -> dict[str, float]:
        losses = {name: one.loss / one.steps for name, one in recent.items()}
        values = {f"loss/{n}": value for n, value in self.run.trainer.global_loss(losses).items()}
        norms = {n: float(one.gradient_norm) / one.steps for n, one in recent.items()}
        return values | {f"grad_norm/{n}": norm for n, norm in norms.items()}

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on training: neither speed nor cost counts it."""
        self._since = (self._since[0] + seconds, self._since[1])

    def write(self) -> None:
        trainer, recent = self.run.trainer, self._recent
        self._recent = {}
        values = self._trained(recent)
        values |= {f"lr/{n}": one.learning_rate for n, one in recent.items()}
        values |= {f"share/{n}": share for n, share in (trainer.last_shares or {}).items()}
        values |= self._performance()
        values |= trainer.replicas.metrics(recent)
        values["weight_norm/model"] = trainer.optimizer.weight_norm()
        for name, examples in trainer.replicas.new_examples(recent).items():
            self.screen.show(trainer.steps_done, f"samples/{name}", examples)
        text = headline(self.run.config, recent, values, self._seconds_left(values))
        self.screen.say(trainer.steps_done, text, values, self.costs.trunk_tokens)
        for warning in self.watch(trainer.stage_index, values):
            self.screen.warn(trainer.steps_done, warning)

    def _seconds_left(self, values: Mapping[str, float]) -> float:
        now = values["perf/step_seconds"]
        self._pace = now if self._pace is None else 0.7 * self._pace + 0.3 * now
        return self._pace * (self.run.config.steps - self.run.trainer.steps_done)

    def _performance(self) -> dict[str, float]:
        trainer = self.run.trainer
        now, done = time.perf_counter(), trainer.steps_done
        seconds, steps = now - self._since[0], done - self._since[1]
        self._since = (now, done)
        spent = self.costs.since_last(seconds)
        return {
            "perf/tokens_per_second": spent["trained_tokens"] / seconds,
            "perf/step_seconds": seconds / steps,
            "perf/mfu": spent["flop"] / seconds / self._peak,
            "perf/skipped_updates": float(self.guard.skipped),
            "perf/peak_memory_gib": _peak_memory(self.run),
            **self.costs.metrics(),
            **trainer.replicas.idle_share(seconds),
        }


def _peak_memory(run: Run) -> float:
    """GiB of the rank that has used most: of its GPU, or else of its process."""
    if run.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(run.device)
    else:
        used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most = torch.tensor([used / 2**30], dtype=torch.float64)
    return float(all_reduce_(most, run.mesh.world, "max"))


def validate(run: Run, costs: Costs, screen: Screen) -> None:
    def loss_of(data: Supervised) -> float:
        data.loader.consumed_sequences = 0
        return run.trainer.evaluate(data)

    values = {f"eval/loss/{name}": loss_of(data) for name, data in run.validation.items()}
    if values:
        text = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        values |= {
            f"eval/perplexity/{name}": math.exp(min(values[f"eval/loss/{name}"], LARGEST_LOSS))
            for name in run.validation
        }
        screen.say(run.trainer.steps_done, text, values, costs.trunk_tokens)


def _in_a_line(results: Sequence[Result]) -> str:
    """Of each suite the first metrics, so that none is left out."""
    each = max(1, SHOWN_METRICS // len(results))
    first = [list(metrics_of([result]).items())[:each] for result in results]
    return "  ".join(f"{key} {value:.3f}" for found in first for key, value in found)


class Evaluation:
    """The suites on the weights as they are; a run that goes on has what it had measured."""

    def __init__(self, run: Run, costs: Costs, steps: StepLog, screen: Screen) -> None:
        self.run, self.costs, self.steps, self.screen = run, costs, steps, screen
        self._went_on = run.trainer.steps_done > 0

    def __call__(self, evaluation: EvaluationConfig) -> None:
        run, done = self.run, self.run.trainer.steps_done
        begun = time.perf_counter()
        results = evaluate(
            self._subject(evaluation),
            evaluation,
            run=run.directory.path,
            parent=self._parent(),
            again=not self._went_on,  # what lies there was left by another run
        )
        for result in results:
            self._show_samples(done, result["suite"])
        if results:
            values = metrics_of(results)
            told = None if self._told(done, values) else values
            self.screen.say(done, _in_a_line(results), told, self.costs.trunk_tokens)
        self.steps.leave_out(time.perf_counter() - begun)

    def _told(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether a finished run that is given again has these results in its metrics."""
        if not self._went_on or self.screen.writer is None:
            return False
        there = [line for line in read_metrics(self.screen.writer.path) if line["step"] == step]
        return any(values.items() <= line.items() for line in there)

    def check(self) -> None:
        """Before anything is trained: what this run will measure can be measured."""
        config = self.run.config
        evaluation = config.evaluation
        due = evaluation.every_steps is not None or evaluation.at_steps or evaluation.at_end
        if due and not evaluation.suites:
            self.screen.warn(
                self.run.trainer.steps_done,
                "[evaluation] says when to measure, and there are no suites: nothing is measured",
            )
        if due and evaluation.suites:
            trained = {name for stage in config.all_stages for name in stage.objectives}
            subject = self._subject(evaluation)
            at_end = subject.is_base and trained <= {PRETRAINING}
            check_files(replace(subject, is_base=at_end), evaluation)

    def _subject(self, evaluation: EvaluationConfig) -> Subject:
        run, tokens = self.run, self.costs.tokens()
        if run.tokenizer is None:
            raise RunError("[evaluation] needs a tokenizer: data.tokenizer names none")
        return Subject(
            run.trainer.model,
            run.tokenizer,
            template_of(run.config.template),
            is_base=not any(n for name, n in tokens.items() if name != PRETRAINING),
            iteration=run.trainer.steps_done,
            trunk_tokens=tokens.get(PRETRAINING, 0),
            made=made_for(evaluation.suites, run.config),
            templates=templates_of(run.config),
        )

    def _show_samples(self, done: int, suite: str) -> None:
        path = samples_path(self.run.directory.path, done, suite)
        if self.screen.writer is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()[:SHOWN_SAMPLES]
            self.screen.show(done, f"samples/{suite}", [json.loads(line) for line in lines])

    def _parent(self) -> EvaluatedParent | None:
        parent = self.run.directory.parent
        return None if parent is None else EvaluatedParent(Path(parent.run), parent.iteration)


class Saving:
    def __init__(self, run: Run, costs: Costs, screen: Screen) -> None:
        self.run, self.costs, self.screen = run, costs, screen
        self._saved_at = run.trainer.steps_done

    def __call__(self, *, blocking: bool) -> None:
        trainer = self.run.trainer
        state = {
            "tokens": self.costs.tokens(),
            "cost": gather_values(self.costs.state(), self.run.mesh.world)[0],
        }
        pause = trainer.save(self.run.saver, state, blocking=blocking)
        self._saved_at = trainer.steps_done
        if self.screen.writer is not None:
            values = {"perf/save_pause_seconds": pause.seconds}
            self.screen.writer.scalars(trainer.steps_done, values)

    def finish(self) -> None:
        if self._saved_at < self.run.trainer.steps_done:
            self.run.saver.wait()
