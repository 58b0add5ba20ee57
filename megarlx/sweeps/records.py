"""A sweep's records: which of its jobs are done whatever has become of their folders.

A job is known by the hash of what it was told: its resolved settings, those of the run that it
starts from, and where. Defaults are left out, so that a key which is new changes nothing; seeds and
paths too, as the file of a seed has one seed and folders may be moved.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megarlx import plug
from megarlx.config import Config, ConfigError, load_config
from megarlx.report.record_files import hash_of
from megarlx.report.records import SeedRecords
from megarlx.report.settings import comparable
from megarlx.sweeps.plan import Job

KEPT = 16  # characters of the hash that a record has of a finished job
NOT_OF_RESULTS = {"checkpoints", "logging"}  # sections of a run


class JobSettings:
    """The hash of each job's settings."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = {job.name: job for job in jobs}
        self._runs: dict[str, tuple[Config, str]] = {}
        self._excursions: dict[tuple[str, ...], tuple[Config, str]] = {}

    def __call__(self, job: Job) -> str:
        if job.arguments[0] != "evaluate":
            return self._run(job.name)[1]
        path, where = _reference(job.arguments[1])
        words = [*_without_out(job.arguments[2:])]
        files = _files_of(job)
        held = [comparable(tomllib.loads(file.read_text(encoding="utf-8"))) for file in files]
        plain = [word for word in words if "/" not in word]
        return hash_of(["evaluate", self._run(path)[1], where, plain, held])

    def all(self) -> str:
        """Of a whole sweep, of however many seeds."""
        return hash_of(sorted({self(job) for job in self.jobs.values()}))

    def check(self) -> None:
        """That each has settings which hold, before the first is run for hours."""
        from megarlx.run.suites import suites_in

        problems: dict[str, None] = {}
        for job in self.jobs.values():
            try:
                self(job)
                for file in _files_of(job):
                    suites_in(file)
            except ConfigError as error:
                problems.update(dict.fromkeys(str(error).splitlines()))
            except ValueError as error:
                problems[str(error)] = None
        if problems:
            raise ConfigError(list(problems))

    def unmeasured(self) -> list[str]:
        """The recipes of runs that have no suites, neither of their own nor a trunk's."""
        found: dict[str, None] = {}
        for job in self.jobs.values():
            if job.arguments[0] == "branch":
                config = self._run(job.name)[0]
                made = config.data is not None and config.data.maker is not None
                if not made and not config.evaluation.suites:
                    found[job.arguments[2]] = None
        return list(found)

    def _run(self, path: str) -> tuple[Config, str]:
        """What it is told and its hash: by its job, or by its folder where it is there."""
        name = Path(path).name
        if name not in self._runs:
            self._runs[name] = self._of_job(self.jobs[name]) if name in self.jobs else _there(path)
        return self._runs[name]

    def _of_job(self, job: Job) -> tuple[Config, str]:
        command, first = job.arguments[:2]
        if command == "train":
            return _hashed(load_config(first, _overrides(job.arguments)))
        return self._of_branch(job) if command == "branch" else self._of_transplant(job)

    def _of_branch(self, job: Job) -> tuple[Config, str]:
        _, first, recipe = job.arguments[:3]
        path, where = _reference(first)
        before, start = self._run(path)
        overrides = _overrides(job.arguments)
        # Of runs that it reads beside the one that it starts from: what is kept of their rollouts.
        read = [self._run(name)[1] for name in job.needs[1:]]
        key = (start, where, recipe, *overrides, *read)
        if key not in self._excursions:
            config = self._excursion(before, recipe, overrides, first)
            self._excursions[key] = config, hash_of([start, where, _told(config), *read])
        return self._excursions[key]

    def _of_transplant(self, job: Job) -> tuple[Config, str]:
        """It is configured as the run that something is added to."""
        words = job.arguments[1:]
        options = [word for word in words if word.startswith("--")]
        first = words.index(options[0])
        told: list[Any] = [[self._run(_reference(text)[0])[1] for text in words[:first]]]
        config: Config | None = None
        for option, value in zip(words[first::2], words[first + 1 :: 2], strict=True):
            if option in ("--onto", "--from", "--match"):
                path, where = _reference(value)
                held, start = self._run(path)
                config = held if option == "--onto" else config
                told.append([option, start, where])
            elif option == "--config":
                told.append([option, comparable(tomllib.loads(Path(value).read_text()))])
            elif option not in ("--out", "--trust"):
                told.append([option, value])
        assert config is not None  # --onto is among them
        return config, hash_of(["transplant", told])

    def _excursion(
        self, before: Config, recipe: str, overrides: Sequence[str], parent: str
    ) -> Config:
        from megarlx.run.branch import recipe_config

        return recipe_config(before, Path(recipe), overrides, parent)


class SweepRecords:
    def __init__(self, folder: Path, jobs: Sequence[Job], suites: Sequence[str] = ()) -> None:
        self.settings, self.suites = JobSettings(jobs), suites
        self.seeds = {seed: SeedRecords.at(folder, seed) for seed in {job.seed for job in jobs}}

    def has(self, job: Job) -> bool:
        known = self.seeds[job.seed].done.get(job.name)
        return known is not None and known == self.settings(job)[:KEPT]

    def add(self, job: Job) -> None:
        """What a finished job has left in the folder of its run; a trunk is kept when measured."""
        if job.arguments[0] != "train" and not self.has(job):
            records = self.seeds[job.seed]
            records.add(job.run, self.suites)
            records.done[job.name] = self.settings(job)[:KEPT]
            records.write()


def _there(path: str) -> tuple[Config, str]:
    return _hashed(load_config(Path(path) / "resolved.json", trusted=()))


def _hashed(config: Config) -> tuple[Config, str]:
    return config, hash_of(_told(config))


def _reference(text: str) -> tuple[str, str]:
    """RUN and what stands behind its @."""
    path, at, where = text.rpartition("@")
    return (path, where) if at else (text, "latest")


def _told(config: Config) -> Any:
    held: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    if config.data is not None and config.data.maker is not None:  # options hold their defaults
        maker = plug.resolve("data maker", config.data.maker)
        options = maker.Options.model_validate(config.data.options)
        held["data"]["options"] = options.model_dump(mode="json", exclude_defaults=True)
    return comparable({key: value for key, value in held.items() if key not in NOT_OF_RESULTS})


def _files_of(job: Job) -> list[Path]:
    """Of suites."""
    pairs = itertools.pairwise(job.arguments)
    return [Path(word) for before, word in pairs if before == "--config"]


def _overrides(words: Sequence[str]) -> list[str]:
    return [word for before, word in itertools.pairwise(words) if before == "--set"]


def _without_out(words: Sequence[str]) -> Iterator[str]:
    for before, word in zip(("", *words), words, strict=False):
        if "--out" not in (before, word):
            yield word
