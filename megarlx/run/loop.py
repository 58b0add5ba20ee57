"""The loop around the trainer's steps: what falls due after each, and when it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from megarlx.checkpoint import check_run_state, latest, read_manifest, reading_state
from megarlx.comm import launch
from megarlx.comm.collectives import CollectiveError, gather_values
from megarlx.printable import complain, indented
from megarlx.redact import from_environment, redacted, secrets_in
from megarlx.run.assemble import Run, steps_at_tokens
from megarlx.run.costs import Costs
from megarlx.run.directory import PREFIX_OF, RunError, SaidByFirstRank
from megarlx.run.hooks import Evaluation, Guard, Saving, StepLog, validate
from megarlx.run.lock import run_lock
from megarlx.run.messages import done, header
from megarlx.run.rank_logs import RankLog, rank_log
from megarlx.run.readiness import beginnings_of_rl, readiness_of
from megarlx.run.screen import Screen
from megarlx.run.stopped import StopRequest, clear_mark, mark_stopped
from megarlx.training.metrics import MetricsWriter
from megarlx.training.trackers import Trackers, check_installed


def train(run: Run, first_step: Callable[[], None] = lambda: None) -> str:
    """Trains to the end of the last stage; returns what stopped it before that, if anything did.

    first_step   called when the first step begins
    """
    place = run.directory.path
    config = run.config.model_dump(mode="json")
    secrets = {*secrets_in(config), *from_environment(config)}
    with run_lock(place, run.mesh.world), rank_log(place, run.mesh.rank, secrets) as log:
        try:
            return _train(run, log, first_step)
        except CollectiveError as error:
            complain(launch.silent_ranks(launch.read(), str(error)))
            raise


def _train(run: Run, log: RankLog, first_step: Callable[[], None]) -> str:
    first = run.mesh.rank == 0
    if first:
        for line in header(run):
            print(line)
        for key, choice in run.choices.items():
            print(f"{key} = {choice}")
    costs = _start(run)
    logging = run.config.logging
    check_installed(logging.trackers)
    writer = _metrics_writer(run, costs.trunk_tokens) if first else None
    stop = StopRequest(logging.stop_after_minutes, says=first)
    screen = Screen(writer, log, run.config.steps)
    loop = _Loop(run, costs, screen, first_step)
    before = run.trainer.steps_done
    with writer or nullcontext(), stop.listening(), screen.progress(before):
        try:
            stopped = loop.until(run.config.steps, stop)
        finally:
            run.close()
    if not stopped:
        if first:
            print(done(run, costs.seconds, run.trainer.steps_done - before))
        return ""
    reason = stop.reason or "another rank"
    if first:
        mark_stopped(run.directory.path, reason, run.trainer.steps_done)
        print(f"stopped by {reason}; saved, start again to go on")
    return reason


def _metrics_writer(run: Run, trunk_tokens: int) -> MetricsWriter:
    steps_done = run.trainer.steps_done
    logging, place = run.config.logging, run.directory.path
    config = redacted(run.config.model_dump(mode="json"))
    trackers = Trackers(logging.trackers, logging.tracker_project, place, config)
    writer = MetricsWriter(
        place,
        resume_at=steps_done + 1 if steps_done else 0,
        trunk_tokens=trunk_tokens,
        trackers=trackers,
    )
    writer.text(steps_done, "config", indented(json.dumps(config, indent=1)))
    return writer


def _start(run: Run) -> Costs:
    """From the run's own last checkpoint, else from its parent's, else from nothing."""
    trainer, parent = run.trainer, run.directory.parent
    costs = Costs(run.config, trainer, parent.tokens if parent is not None else {})
    checkpoint = latest(run.directory.checkpoints, run.mesh.world)
    if checkpoint is not None:
        check_run_state(checkpoint, read_manifest(checkpoint))
        with reading_state(checkpoint):
            loaded = trainer.resume(checkpoint)
            costs.load_state(loaded.state["run"]["cost"])
        text = f"going on from {checkpoint}, step {trainer.steps_done}"
    elif parent is not None:
        with reading_state(parent.checkpoint):
            trainer.start_from(parent.checkpoint, PREFIX_OF[parent.weights])
        text = f"starting from {parent.checkpoint}"
        text += "".join(f"\n{said}" for said in _ended_courses(run))
    else:
        _check_nothing_goes_on(run)
        return costs
    if run.mesh.rank == 0:
        clear_mark(run.directory.path)
        print(text)
    return costs


def _ended_courses(run: Run) -> Iterator[str]:
    """A course stays at the rate in which it ends, and that may be none."""
    for name, one in run.config.all_stages[0].objectives.items():
        if one.inherit and one.lr > 0 and run.trainer.learning_rate(name) == 0:
            yield (
                f"warning: {name} goes on at the learning rate 0, in which its course of "
                f"{one.schedule_steps:,} steps ended, and learns nothing; a longer schedule_steps "
                "in its table goes on with the course"
            )


def _check_nothing_goes_on(run: Run) -> None:
    if names := sorted(run.trainer.timeline.from_before):
        raise RunError(
            f"inherit of {', '.join(names)} is true, but no stage before has it, and this run has "
            "no parent to go on from; an excursion (`megarlx branch`) has one"
        )


class _Loop:
    def __init__(
        self, run: Run, costs: Costs, screen: Screen, first_step: Callable[[], None]
    ) -> None:
        self.run, self.costs, self.screen, self.first_step = run, costs, screen, first_step
        self.guard = Guard(run)
        self.log = StepLog(run, costs, self.guard, screen)
        self.evaluate = Evaluation(run, costs, self.log, screen)
        self.save = Saving(run, costs, screen)
        self.listed = set(steps_at_tokens(run.config))
        self.due: set[str] = set()
        prompts = run.config.evaluation.readiness_prompts
        self.probed = beginnings_of_rl(run.config) if prompts else {}

    def until(self, steps: int, stop: StopRequest) -> bool:
        """Whether it was told to stop before."""
        self.evaluate.check()
        trainer, config = self.run.trainer, self.run.config
        while trainer.steps_done < steps:
            if names := self.probed.get(trainer.steps_done):
                self.evaluate(readiness_of(config, names))
            self.first_step()
            self._step(steps)
            last = trainer.steps_done == steps
            stopping = stop.agreed(self.run.mesh.world)
            self._note_what_is_due(last=last, stopping=stopping)
            if trainer.in_sync:
                self._do_what_is_due(wait=last or stopping)
            else:
                self.run.saver.poll()
            self.screen.advance(trainer.steps_done)
            if stopping and not last and trainer.in_sync:
                return True
            if trainer.in_sync and "evaluate" in self.due:
                self.due.discard("evaluate")
                self.evaluate(config.evaluation)
        if config.evaluation.at_end:
            self.evaluate(config.evaluation)
        self.save.finish()
        return False

    def _step(self, steps: int) -> None:
        losses, report = self.run.trainer.step()
        steps_done = self.run.trainer.steps_done
        while self.run.trainer.notices:
            self.screen.say(steps_done, self.run.trainer.notices.pop(0))
        self.guard.after_step(steps_done - 1, report.found_inf, last=steps_done == steps)
        self.log.record(losses, report.gradient_norms)
        if steps_done == steps or steps_done % self.run.config.logging.log_every_steps == 0:
            self.log.write()
        else:
            self.log.write_policies(losses)

    def _note_what_is_due(self, *, last: bool, stopping: bool) -> None:
        """Between two averages there is no one set of weights: what is due then waits."""
        config, before, steps_done = self.run.config, set(self.due), self.run.trainer.steps_done

        def falls_on(every: int | None) -> bool:
            return bool(every and steps_done % every == 0)

        due = {
            "compare": falls_on(config.logging.compare_replicas_every_steps),
            "validate": last or falls_on(config.logging.validate_every_steps),
            "save": last
            or stopping
            or steps_done in self.listed
            or falls_on(config.checkpoints.save_every_steps),
            "evaluate": not last
            and (
                steps_done in config.evaluation.at_steps or falls_on(config.evaluation.every_steps)
            ),
        }
        self.due |= {what for what, now in due.items() if now}
        if "save" in self.due - before and not self.run.trainer.in_sync:
            step = config.timeline.next_average(steps_done)
            self.screen.say(
                steps_done, f"the checkpoint waits for step {step}, which averages the objectives"
            )

    def _do_what_is_due(self, *, wait: bool) -> None:
        if "compare" in self.due:
            self.guard.compare_replicas()
        if "validate" in self.due:
            validate(self.run, self.costs, self.screen)
        if "save" in self.due:
            self.save(blocking=wait or not self.run.config.checkpoints.in_background)
        else:
            self.run.saver.poll()
        self.due &= {"evaluate"}


def check_startable(run: Run, fresh: bool) -> None:
    """On every rank, with one answer: a folder that can be trained in."""
    problem = ""
    if run.mesh.rank == 0:
        try:
            if fresh:
                run.directory.check_fresh()
            run.directory.check_was_trained()
            if run.directory.has_checkpoints:
                run.directory.check_same_run(run.config)
        except RunError as error:
            problem = str(error)
    problem = gather_values(problem, run.mesh.world)[0]
    if problem:
        raise (RunError if run.mesh.rank == 0 else SaidByFirstRank)(problem)
