"""The loop around the trainer's steps: log, validate, save, stop."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megarlx.checkpoint import latest
from megarlx.comm import launch
from megarlx.comm.collectives import gather_values
from megarlx.config.evaluation import EvaluationConfig
from megarlx.config.objectives import PRETRAINING
from megarlx.evaluation.results import samples_path
from megarlx.evaluation.suites import Parent as EvaluatedParent
from megarlx.evaluation.suites import Subject, evaluate, metrics_of
from megarlx.metrics import MetricsWriter
from megarlx.objectives.supervised import Supervised
from megarlx.run.assemble import Run, steps_at_tokens
from megarlx.run.costs import Costs, peak_flop_per_second
from megarlx.run.directory import RunError
from megarlx.run.finite import Flags, FoundInf
from megarlx.run.lock import run_lock
from megarlx.run.made import made_for
from megarlx.run.rank_logs import RankLog, rank_log
from megarlx.run.readiness import beginnings_of_rl, readiness_of
from megarlx.run.stopped import REQUEUE, StopRequest, clear_mark, exit_code, mark_stopped
from megarlx.run.tokenizer import template_of
from megarlx.trackers import Trackers, check_installed

SHOWN_SAMPLES = 4


class TrainingError(RuntimeError):
    """Training cannot go on: which step, which objective, what went wrong."""


def train(run: Run) -> int:
    """Trains to the end of the last stage; returns the exit code."""
    place = run.directory.path
    with run_lock(place, run.mesh.world), rank_log(place, run.mesh.rank) as log:
        return _train(run, log)


def _train(run: Run, log: RankLog) -> int:
    first = run.mesh.rank == 0
    if first:
        for key, choice in run.choices.items():
            print(f"{key} = {choice}")
    costs = _start(run)
    logging = run.config.logging
    check_installed(logging.trackers)
    writer = _metrics_writer(run, costs.trunk_tokens) if first else None
    stop = StopRequest(logging.stop_after_minutes)
    loop = _Loop(run, costs, writer, log)
    with writer or nullcontext(), stop.listening(), loop.progress():
        try:
            code = loop.until(run.config.steps, stop)
        finally:
            run.close()
    if code != REQUEUE:
        return code
    if first:
        reason = stop.reason or "another rank"
        mark_stopped(run.directory.path, reason, run.trainer.steps_done)
        print(f"stopped by {reason}; saved, start again to go on")
    return exit_code(launch.read().launcher)


def _metrics_writer(run: Run, trunk_tokens: int) -> MetricsWriter:
    done = run.trainer.steps_done
    logging, place = run.config.logging, run.directory.path
    config = run.config.model_dump(mode="json")
    trackers = Trackers(logging.trackers, logging.tracker_project, place, config)
    return MetricsWriter(
        place, resume_at=done + 1 if done else 0, trunk_tokens=trunk_tokens, trackers=trackers
    )


def _start(run: Run) -> Costs:
    """From the run's own last checkpoint, else from its parent's, else from nothing."""
    trainer, parent = run.trainer, run.directory.parent
    costs = Costs(run.config, trainer, parent.tokens if parent is not None else {})
    checkpoint = latest(run.directory.checkpoints, run.mesh.world)
    if checkpoint is not None:
        loaded = trainer.resume(checkpoint)
        costs.load_state(loaded.state["run"]["cost"])
        text = f"going on from {checkpoint}, step {trainer.steps_done}"
    elif parent is not None:
        trainer.start_from(parent.checkpoint)
        text = f"starting from {parent.checkpoint}"
    else:
        _check_nothing_goes_on(run)
        return costs
    if run.mesh.rank == 0:
        clear_mark(run.directory.path)
        print(text)
    return costs


def _check_nothing_goes_on(run: Run) -> None:
    if names := sorted(run.trainer.timeline.from_before):
        raise RunError(
            f"goes_on of {', '.join(names)} is true, but no stage before has it, and this run has "
            "no parent to go on from; an excursion (`megarlx branch`) has one"
        )


@dataclass(frozen=True)
class _Trained:
    """An objective's last step, on the device until it is logged."""

    loss: torch.Tensor
    gradient_norm: torch.Tensor
    learning_rate: float


class _Loop:
    def __init__(self, run: Run, costs: Costs, writer: MetricsWriter | None, log: RankLog) -> None:
        self.run, self.writer, self.log = run, writer, log
        self.listed = set(steps_at_tokens(run.config))
        self.finite = FoundInf(run.device)
        self.skipped_in_a_row: dict[str, int] = dict.fromkeys(run.trainer.objectives, 0)
        self.skipped = 0
        self.recent: dict[str, _Trained] = {}
        self.bar: Progress | None = None
        self.since = (time.perf_counter(), run.trainer.steps_done)
        self.costs = costs
        self.peak = peak_flop_per_second(run.device) * run.mesh.world.size
        self.saved_at = run.trainer.steps_done
        self.went_on = run.trainer.steps_done > 0
        self.due: set[str] = set()
        prompts = run.config.evaluation.readiness_prompts
        self.probed = beginnings_of_rl(run.config) if prompts else {}

    @contextmanager
    def progress(self) -> Iterator[None]:
        if self.run.mesh.rank or not self.log.terminal.isatty():
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        console = Console(file=self.log.terminal)
        with Progress(*columns, console=console) as self.bar, self.log.beside_progress():
            total = self.run.config.steps
            self.task = self.bar.add_task(
                "training", total=total, completed=self.run.trainer.steps_done
            )
            yield
        self.bar = None

    def until(self, steps: int, stop: StopRequest) -> int:
        trainer, config = self.run.trainer, self.run.config
        while trainer.steps_done < steps:
            if names := self.probed.get(trainer.steps_done):
                self._evaluate(readiness_of(config, names))
            losses, report = trainer.step()
            done = trainer.steps_done
            last = done == steps
            self._check_finite(self.finite.put(done - 1, report.found_inf))
            if last:
                self._check_finite(self.finite.last())
            for name, loss in losses.items():
                self.recent[name] = _Trained(
                    loss, report.gradient_norms[name], trainer.last_rates[name]
                )
            if last or done % config.logging.log_every_steps == 0:
                self._log()
            stopping = stop.agreed(self.run.mesh.world)
            self._note_what_is_due(done, last=last, stopping=stopping)
            if trainer.in_sync:
                self._do_what_is_due(wait=last or stopping)
            else:
                self.run.saver.poll()
            if self.bar is not None:
                self.bar.update(self.task, completed=done)
            if stopping and not last and trainer.in_sync:
                return REQUEUE
            if trainer.in_sync and "evaluate" in self.due:
                self.due.discard("evaluate")
                self._evaluate(config.evaluation)
        if config.evaluation.at_end:
            self._evaluate(config.evaluation)
        if self.saved_at < trainer.steps_done:
            self.run.saver.wait()
        return 0

    def _note_what_is_due(self, done: int, *, last: bool, stopping: bool) -> None:
        """Between two averages there is no one set of weights: what is due then waits."""
        config, before = self.run.config, set(self.due)

        def falls_on(every: int | None) -> bool:
            return bool(every and done % every == 0)

        due = {
            "compare": falls_on(config.logging.compare_replicas_every_steps),
            "validate": last or falls_on(config.logging.validate_every_steps),
            "save": last
            or stopping
            or done in self.listed
            or falls_on(config.checkpoints.save_every_steps),
            "evaluate": not last and falls_on(config.evaluation.every_steps),
        }
        self.due |= {what for what, now in due.items() if now}
        if "save" in self.due - before and not self.run.trainer.in_sync:
            step = config.timeline.next_average(done)
            self._say(done, f"the checkpoint waits for step {step}, which averages the objectives")

    def _do_what_is_due(self, *, wait: bool) -> None:
        if "compare" in self.due:
            self._compare_replicas()
        if "validate" in self.due:
            self._validate()
        if "save" in self.due:
            self._save(blocking=wait or not self.run.config.checkpoints.in_background)
        else:
            self.run.saver.poll()
        self.due &= {"evaluate"}

    def _check_finite(self, flags: Flags | None) -> None:
        if flags is None:
            return
        for name, skipped in flags.skipped.items():
            if not skipped:
                self.skipped_in_a_row[name] = 0
                continue
            self.skipped += 1
            self.skipped_in_a_row[name] += 1
            if self.skipped_in_a_row[name] > self.run.config.logging.skipped_updates_allowed:
                where = gather_values(self.run.trainer.first_non_finite(name), self.run.mesh.world)
                bad = next((place for place in where if place), "no single parameter")
                raise TrainingError(
                    f"step {flags.step}: the gradient of '{name}' is not "
                    f"finite, {self.skipped_in_a_row[name]} steps in a row; first in {bad}. "
                    "logging.skipped_updates_allowed is "
                    f"{self.run.config.logging.skipped_updates_allowed}"
                )

    def _log(self) -> None:
        """Of every objective's last step since it was last logged: they may have taken turns."""
        trainer, recent = self.run.trainer, self.recent
        self.recent = {}
        losses = {name: one.loss for name, one in recent.items()}
        values = {f"loss/{name}": value for name, value in trainer.global_loss(losses).items()}
        now, done = time.perf_counter(), trainer.steps_done
        seconds, steps = now - self.since[0], done - self.since[1]
        self.since = (now, done)
        spent = self.costs.since_last(seconds)
        values |= {f"grad_norm/{n}": float(one.gradient_norm) for n, one in recent.items()}
        values |= {f"lr/{n}": one.learning_rate for n, one in recent.items()}
        values |= {f"share/{n}": share for n, share in (trainer.last_shares or {}).items()}
        values |= {
            "perf/tokens_per_second": spent["trained_tokens"] / seconds,
            "perf/step_seconds": seconds / steps,
            "perf/mfu": spent["flop"] / seconds / self.peak,
            "perf/skipped_updates": float(self.skipped),
            **self.costs.metrics(),
            **trainer.idle_share(seconds),
            **trainer.metrics(losses),
        }
        for name, examples in trainer.new_examples(losses).items():
            self._show(f"samples/{name}", examples)
        several = len(trainer.objectives) > 1
        shown = [
            f"{name if several else ''} loss {values[f'loss/{name}']:.4f}".lstrip()
            for name in losses
        ]
        shown += [f"reward {values['rl/reward']:.3f}"] if "rl/reward" in values else []
        text = "  ".join([*shown, f"{values['perf/tokens_per_second']:,.0f} tokens/s"])
        self._say(done, f"{text}  mfu {values['perf/mfu']:.2f}", values)

    def _say(self, step: int, text: str, values: Mapping[str, float] | None = None) -> None:
        if self.writer is None:
            return
        if values:
            self.writer.scalars(step, values, self.costs.trunk_tokens)
        if self.bar is not None:
            self.bar.update(self.task, description=text)
        else:
            print(f"step {step}: {text}", flush=True)

    def _show(self, key: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """A few samples as TensorBoard text; what a model wrote is shown, not rendered."""
        if self.writer is None or not samples:
            return
        parts = [
            f"    {'prompt':<14}{sample['prompt']}\n    {'completion':<14}{sample['completion']}\n"
            f"    {'reference':<14}{sample['reference']}\n    {'reward':<14}{sample['reward']} "
            f"({sample['finish_reason']})\n"
            for sample in samples[:SHOWN_SAMPLES]
        ]
        self.writer.text(self.run.trainer.steps_done, key, "\n".join(parts))

    def _validate(self) -> None:
        values = {}
        for name, data in self.run.validation.items():
            values[f"eval/loss/{name}"] = self._validation_loss(data)
        if values:
            text = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
            self._say(self.run.trainer.steps_done, text, values)

    def _validation_loss(self, data: Supervised) -> float:
        data.loader.consumed_sequences = 0
        return self.run.trainer.evaluate(data)

    def _evaluate(self, evaluation: EvaluationConfig) -> None:
        """The suites on the weights as they are; a run that goes on has what it had measured."""
        run, done = self.run, self.run.trainer.steps_done
        tokens = self.costs.tokens()
        if run.tokenizer is None:
            raise RunError("[evaluation] needs a tokenizer: data.tokenizer names none")
        begun = time.perf_counter()
        results = evaluate(
            Subject(
                run.trainer.model,
                run.tokenizer,
                template_of(run.config.template),
                is_base=not any(n for name, n in tokens.items() if name != PRETRAINING),
                iteration=done,
                trunk_tokens=tokens.get(PRETRAINING, 0),
                made=made_for(evaluation.suites, run.config),
            ),
            evaluation,
            run=run.directory.path,
            parent=self._evaluated_parent(),
            again=not self.went_on,  # what lies there was left by another run
        )
        values = metrics_of(results)
        for result in results:
            path = samples_path(run.directory.path, done, result["suite"])
            if self.writer is not None and path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()[:SHOWN_SAMPLES]
                self._show(f"samples/{result['suite']}", [json.loads(line) for line in lines])
        headline = "  ".join(f"{key} {value:.3f}" for key, value in list(values.items())[:6])
        self._say(done, headline, values)
        # Not training: neither speed nor cost counts it.
        self.since = (self.since[0] + time.perf_counter() - begun, self.since[1])

    def _evaluated_parent(self) -> EvaluatedParent | None:
        parent = self.run.directory.parent
        return None if parent is None else EvaluatedParent(Path(parent.run), parent.iteration)

    def _save(self, *, blocking: bool) -> None:
        trainer = self.run.trainer
        state = {
            "tokens": self.costs.tokens(),
            "cost": gather_values(self.costs.state(), self.run.mesh.world)[0],
        }
        pause = trainer.save(self.run.saver, state, blocking=blocking)
        self.saved_at = trainer.steps_done
        if self.writer is not None:
            self.writer.scalars(trainer.steps_done, {"perf/save_pause_seconds": pause.seconds})

    def _compare_replicas(self) -> None:
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


def check_startable(run: Run, fresh: bool) -> None:
    """On every rank, with one answer: a folder that can be trained in."""
    problem = ""
    if run.mesh.rank == 0:
        try:
            if fresh:
                run.directory.check_fresh()
            elif run.directory.has_checkpoints:
                run.directory.check_same_run(run.config)
        except RunError as error:
            problem = str(error)
    problem = gather_values(problem, run.mesh.world)[0]
    if problem:
        raise RunError(problem)
