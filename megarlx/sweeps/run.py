"""Runs a sweep's jobs, several at a time; a job that fails stops only what needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from megarlx import processes
from megarlx.config.sweep import SweepConfig
from megarlx.printable import printable
from megarlx.sweeps.plan import Job
from megarlx.sweeps.records import JobSettings, SweepRecords
from megarlx.training.metrics import read_metrics

POLL_SECONDS = 0.5
TELL_SECONDS = 20.0  # between lines about what runs, where no table can be shown
LEFT = 75  # exit code when the budget left some runs for later
NONE = 3  # exit code of a transplant that no alpha makes: a finding, no failure
UNMEASURED = ("train", "transplant")  # commands whose runs are measured by others


@dataclass
class Progress:
    """What is known of a job while the sweep goes on."""

    job: Job
    state: str = "waiting"  # waiting, running, done, failed, left, none
    begun: float = 0.0
    seconds: float = 0.0
    said: str = ""  # what its mark will hold; files may be changed while it is made
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def step(self) -> int:
        if self.job.out is None:
            return 0
        step = 0
        for line in read_metrics(self.job.out / "metrics.jsonl"):
            step = line["step"]
        return step


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Who is told to end by a scheduler ends its runs too, as with Ctrl-C: each saves first."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def told_to_end_later() -> Iterator[None]:
    """A process that is starting is known to us before SIGINT or SIGTERM interrupts anything."""
    told: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: told.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        signal.raise_signal(told[0])


class SweepRunner:
    def __init__(self, config: SweepConfig, jobs: Sequence[Job], *, console: Console) -> None:
        self.config, self.console = config, console
        self.logs = Path(config.out) / "logs"
        self.all = {job.name: Progress(job) for job in jobs}
        self.begun = self._told = time.monotonic()
        self.records: SweepRecords | None = None
        if config.records is not None:
            self.records = SweepRecords(Path(config.records), jobs, config.record_suites)
        self.settings = self.records.settings if self.records else JobSettings(jobs)

    def run(self) -> int:
        """0 when all jobs are done, 1 when one failed, 75 when the budget left some."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._find_done()
        if len(self._in("done")) == len(self.all):
            self._say(
                f"all {len(self.all)} are done already; next: megarlx report {self._to_report()}"
            )
        live = Live(console=self.console, refresh_per_second=2, transient=True)
        show = self.console.is_terminal
        with sigterm_as_interrupt():
            try:
                if show:
                    live.start()
                while self._advance():
                    if show:
                        live.update(self.table())
                    else:
                        self._tell()
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_all()
                if show:
                    live.stop()
        states = [progress.state for progress in self.all.values()]
        if "failed" in states:
            return 1
        return LEFT if "left" in states else 0

    def _to_report(self) -> str:
        """What a report can be made of: the runs, their records, or both."""
        out, records = self.config.out, self.config.records
        here = [(p.job.run / "lineage.json").exists() for p in self.all.values()]
        if records is None or all(here):
            return out
        return f"{out} --records {records}" if any(here) else records

    def _tell(self) -> None:
        """Now and then a line for each job under way."""
        if time.monotonic() - self._told < TELL_SECONDS:
            return
        self._told = time.monotonic()
        for progress in self._in("running"):
            step, steps = progress.step(), progress.job.steps
            where = f"step {step} of {steps}" if steps else f"step {step}" if step else "at work"
            self._say(f"{progress.job.name}: {where}, {progress.seconds:.0f} s")

    def _find_done(self) -> None:
        """From behind, as what is gone is made again where something is still to start from it."""
        for progress in reversed(self.all.values()):
            if self._is_done(progress.job):
                progress.state = "done"

    def _is_done(self, job: Job) -> bool:
        """A run whose folder is gone is not, unless the records hold what it measured."""
        marker = self._marker(job)
        here = job.run == Path() or (job.run / "lineage.json").exists()
        if here and marker.exists() and marker.read_text(encoding="utf-8") == self._said(job):
            if self.records is not None:
                self.records.add(job)
            return True
        if self.records is None:
            return False
        below = [p.state == "done" for p in self.all.values() if job.name in p.job.needs]
        kept = self.records.has(job) or (job.arguments[0] in UNMEASURED and bool(below))
        return kept and all(below)

    def _marker(self, job: Job) -> Path:
        """Written when a job is done, with the command that it was."""
        return self.logs / f"{job.name}.done"

    def _said(self, job: Job) -> str:
        """The command, and what the configurations say that it and the jobs before it name."""
        words = " ".join(job.arguments)
        return f"{words}\n{self.settings(job)}\n"

    def _advance(self) -> bool:
        """Whether anything is still to be waited for."""
        for progress in self._in("running"):
            assert progress.process is not None
            code = progress.process.poll()
            progress.seconds = time.monotonic() - progress.begun
            if code is not None:
                self._ended(progress, code)
        over = self.config.budget_minutes is not None and (
            time.monotonic() - self.begun > 60 * self.config.budget_minutes
        )
        for progress in self._in("waiting"):
            needed = {self.all[name].state for name in progress.job.needs}
            if over or needed & {"failed", "left"}:
                progress.state = "left"
            elif "none" in needed:
                progress.state = "none"
            elif len(self._in("running")) < self.config.jobs and needed <= {"done"}:
                self._start(progress)
        return bool(self._in("running") or self._in("waiting"))

    def _in(self, state: str) -> list[Progress]:
        return [progress for progress in self.all.values() if progress.state == state]

    def _start(self, progress: Progress) -> None:
        job = progress.job
        given = os.environ.get("OMP_NUM_THREADS")
        threads = self.config.threads_per_job or given or self._threads()
        command = [*(self.config.launcher or (sys.executable,)), "-m", "megarlx", *job.arguments]
        progress.said = self._said(job)
        with (self.logs / f"{job.name}.log").open("ab") as log, told_to_end_later():
            progress.process = processes.start(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            progress.state, progress.begun = "running", time.monotonic()

    def _threads(self) -> int:
        """The machine, shared with the jobs that could run at the same time."""
        done = {name for name, progress in self.all.items() if progress.state == "done"}
        could = [p for p in self._in("waiting") if done.issuperset(p.job.needs)]
        together = min(self.config.jobs, len(could) + len(self._in("running")))
        return max(1, len(os.sched_getaffinity(0)) // max(together, 1))

    def _ended(self, progress: Progress, code: int) -> None:
        job = progress.job
        nothing = job.arguments[0] == "transplant" and code == NONE
        progress.state = "done" if code == 0 else "none" if nothing else "failed"
        if code == 0:
            self._marker(job).write_text(progress.said, encoding="utf-8")
            if self.records is not None:
                self.records.add(job)
        counts = f"{sum(p.state == 'done' for p in self.all.values())} of {len(self.all)}"
        if code == 0:
            self._say(f"{job.name}: done in {progress.seconds:.0f} s ({counts}{self._left()})")
            return
        log = self.logs / f"{job.name}.log"
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        ended = "cannot be made" if nothing else f"failed with code {code}"
        self._say(f"{job.name}: {ended}; {log} ends with\n  " + "\n  ".join(map(printable, last)))

    def _left(self) -> str:
        """How long the rest may take, by what jobs of the same kind took."""
        took = {p.job.arguments[0]: [] for p in self.all.values()}  # type: dict[str, list[float]]
        for progress in self._in("done"):
            if progress.seconds:
                took[progress.job.arguments[0]].append(progress.seconds)
        missing = [*self._in("waiting"), *self._in("running")]
        known = [took[p.job.arguments[0]] for p in missing]
        if not missing or not all(known):
            return ""
        pairs = zip(missing, known, strict=True)
        left = [sum(times) / len(times) - one.seconds for one, times in pairs]
        if any(seconds < 0 for seconds in left):
            return ""  # one takes longer than those before it, nobody knows how much
        return f", about {sum(left) / self.config.jobs / 60:.1f} minutes left"

    def _stop_all(self) -> None:
        """Each run ends its step and is saved, however long that takes; a Ctrl-C now ends them."""
        running = self._in("running")
        if not running:
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers repeat theirs
        names = ", ".join(progress.job.name for progress in running)
        self._say(
            f"stopping {names}: each is saved first; the same command goes on from there. "
            "Ctrl-C now ends them at once, without saving"
        )
        waited = [one.process for one in running if one.process is not None]
        try:
            for process in waited:
                processes.signal_group(process, signal.SIGTERM)
            for progress in running:
                self._wait_for(progress)
        except KeyboardInterrupt:
            for process in waited:
                processes.signal_group(process)
            raise

    def _wait_for(self, progress: Progress) -> None:
        assert progress.process is not None
        while True:
            try:
                progress.process.wait(timeout=TELL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                self._say(f"{progress.job.name}: its step is not done yet")

    def _say(self, text: str) -> None:
        """In one line, whatever the width, where no terminal breaks it."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self) -> Table:
        table = Table(box=None)
        for heading in ("run", "state", "step", "seconds", "left"):
            table.add_column(heading)
        for progress in self._in("running"):
            step, steps = progress.step(), progress.job.steps
            left = ""
            if steps and step:
                left = f"{progress.seconds * (steps - step) / step:.0f} s"
            shown = f"{step} of {steps}" if steps else str(step or "")
            row = (progress.job.name, progress.state, shown, f"{progress.seconds:.0f}", left)
            table.add_row(*row)
        done = len(self._in("done"))
        table.caption = f"{done} of {len(self.all)} done{self._left()}"
        return table


def slurm_script(config: SweepConfig, jobs: Sequence[Job]) -> str:
    """The sweep as Slurm job arrays: what needs nothing first, then what waits."""
    depths: dict[str, int] = {}
    for job in jobs:
        depths[job.name] = max((1 + depths[name] for name in job.needs), default=0)
    levels = [
        [job for job in jobs if depths[job.name] == n] for n in range(1 + max(depths.values()))
    ]
    launcher = " ".join(config.launcher or ("python",))
    lines = [
        "#!/bin/bash",
        "# Submits the sweep: bash THIS_FILE [sbatch options]",
        "set -euo pipefail",
        f"mkdir -p {config.out}/logs",
    ]
    for number, group in enumerate(levels):
        commands = "\n".join(
            f"  {i}) {launcher} -m megarlx {' '.join(map(_quoted, job.arguments))};;"
            for i, job in enumerate(group)
        )
        after = "" if number == 0 else f'--dependency="afterok:$level{number - 1}" '
        lines += [
            f'level{number}=$(sbatch --parsable "$@" {after}'
            f"--array=0-{len(group) - 1}%{config.jobs} --requeue "
            f"--output={config.out}/logs/%A_%a.log <<'EOF'",
            "#!/bin/bash",
            'case "$SLURM_ARRAY_TASK_ID" in',
            commands,
            "esac",
            "EOF",
            ")",
        ]
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)
