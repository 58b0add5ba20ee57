"""A sweep's records: which of its jobs are done whatever has become of their folders.

A job is known by the hash of what it was told: its resolved settings, those of the run that it
starts from, and where. Defaults are left out, so that a key which is new changes nothing; seeds and
paths too, as the file of a seed has one seed and folders may be moved.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megarlx.config import Config, load_config
from megarlx.report.records import SeedRecords, hash_of
from megarlx.report.settings import comparable
from megarlx.sweeps.plan import Job

NOT_OF_RESULTS = {"checkpoints", "logging"}  # sections of a run


class JobSettings:
    """The hash of each job's settings."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = {job.name: job for job in jobs}
        self._trunks: dict[str, tuple[Config, str]] = {}
        self._excursions: dict[tuple[str, ...], str] = {}

    def __call__(self, job: Job) -> str:
        command, first = job.arguments[:2]
        if command == "train":
            return self._trunk(job.name)[1]
        before, trunk = self._trunk(job.needs or first.rpartition("@")[0])
        where = first.rpartition("@")[2]
        if command != "branch":
            words = [*_without_out(job.arguments[2:])]
            files = [Path(word) for word in words if word.endswith(".toml")]
            held = [comparable(tomllib.loads(file.read_text(encoding="utf-8"))) for file in files]
            return hash_of([command, trunk, where, [w for w in words if "/" not in w], held])
        recipe, overrides = job.arguments[2], _overrides(job.arguments)
        key = (trunk, where, recipe, *overrides)
        if key not in self._excursions:
            told = _told(self._excursion(before, recipe, overrides, first))
            self._excursions[key] = hash_of([trunk, where, told])
        return self._excursions[key]

    def all(self) -> str:
        """Of a whole sweep, of however many seeds."""
        return hash_of(sorted({self(job) for job in self.jobs.values()}))

    def _trunk(self, name: str) -> tuple[Config, str]:
        """By its job, or by its folder where it is there."""
        if name not in self._trunks:
            if name in self.jobs:
                words = self.jobs[name].arguments
                config = load_config(words[1], _overrides(words))
            else:
                config = load_config(Path(name) / "resolved.json", trusted=())
            self._trunks[name] = (config, hash_of(_told(config)))
        return self._trunks[name]

    def _excursion(
        self, before: Config, recipe: str, overrides: Sequence[str], parent: str
    ) -> Config:
        from megarlx.run.branch import recipe_config

        return recipe_config(before, Path(recipe), overrides, parent)


class SweepRecords:
    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.settings = JobSettings(jobs)
        self.seeds = {seed: SeedRecords.at(folder, seed) for seed in {job.seed for job in jobs}}

    def has(self, job: Job) -> bool:
        known = self.seeds[job.seed].done.get(job.name)
        return known is not None and known == self.settings(job)

    def add(self, job: Job) -> None:
        """What a finished job has left in the folder of its run; a trunk is kept when measured."""
        if job.arguments[0] != "train" and not self.has(job):
            records = self.seeds[job.seed]
            records.add(job.run)
            records.done[job.name] = self.settings(job)
            records.write()


def _told(config: Config) -> Any:
    held: Mapping[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    return comparable({key: value for key, value in held.items() if key not in NOT_OF_RESULTS})


def _overrides(words: Sequence[str]) -> list[str]:
    return [word for before, word in itertools.pairwise(words) if before == "--set"]


def _without_out(words: Sequence[str]) -> Iterator[str]:
    for before, word in zip(("", *words), words, strict=False):
        if "--out" not in (before, word):
            yield word
