"""Environments' tasks, demonstrations and words as a data maker: `[data] maker = "agents"`."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from megarlx.config.environment import EnvironmentConfig
from megarlx.config.evaluation import SuiteConfig
from megarlx.config.objectives import PLACE, TemplateConfig
from megarlx.config.section import Named, Section

if TYPE_CHECKING:  # a configuration that names this maker is read without numpy
    from megarlx.data.making import Line, Made, Wanted

WORDS = "agents.words"


class PlaceOptions(Section):
    """An environment whose tasks and demonstrations are written."""

    function: Annotated[str, Named("environment")] = Field(
        description="As in [rl.environment]; one that can solve its tasks"
    )
    name: str | None = Field(
        default=None, pattern=r"^[\w-]+$", description="Of its folder; absent: the class's"
    )
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the class")
    max_turns: int = Field(default=8, ge=1, description="Demonstrations end before that many")
    tasks: int = Field(default=1024, ge=1, description="Tasks to learn on")
    test_tasks: int = Field(
        default=128, ge=1, description="Tasks for tests and for validation, each"
    )
    demonstrations: int = Field(
        default=256, ge=1, description="Episodes of the solver, for a supervised cold start"
    )
    mistakes: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a demonstration's actions drawn at random"
    )
    solved_only: bool = Field(
        default=True, description="Whether demonstrations that end without success are left out"
    )

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]

    @property
    def environment(self) -> EnvironmentConfig:
        return EnvironmentConfig(
            function=self.function, options=self.options, max_turns=self.max_turns
        )


class AgentsOptions(Section):
    """Environments, and the template whose words a tokenizer needs too."""

    seed: int = Field(default=0, ge=0, description="Seed of the demonstrations' mistakes")
    environments: Annotated[tuple[PlaceOptions, ...], Field(strict=False)] = Field(
        description="Each a [[data.options.environments]] table"
    )
    template: TemplateConfig | None = Field(
        default=None, description="How turns are written; absent: as [template] says"
    )

    def problems(self) -> list[tuple[str, str]]:
        labels = [place.label for place in self.environments]
        if not labels or len(set(labels)) < len(labels):
            given = ", ".join(labels) or "none"
            return [("environments", f"are {given}; needed is one or more, each with its name")]
        return []


class AgentsMaker:
    """NAME/tasks_<split>.jsonl and NAME/demonstrations.jsonl of each environment; and of all of
    them demonstrations.jsonl and agents.words."""

    Options = AgentsOptions
    template: TemplateConfig | None = None
    evaluated: tuple[SuiteConfig, ...] = ()

    def write(self, folder: Path, options: AgentsOptions) -> None:
        from megarlx.data.token_files import write_atomically
        from megarlx.rollouts.environments.interface import built_in
        from megarlx.study.environments.demonstrations import Sizes, write_environment

        demonstrations: list[str] = []
        words = dict.fromkeys(_words_of(options.template))
        for place in options.environments:
            sizes = Sizes(place.tasks, place.test_tasks, place.test_tasks, place.demonstrations)
            own = folder / place.label
            write_environment(
                place.environment,
                own,
                sizes,
                seed=options.seed,
                mistakes=place.mistakes,
                solved_only=place.solved_only,
            )
            text = (own / "demonstrations.jsonl").read_text(encoding="utf-8")
            demonstrations += text.splitlines(keepends=True)
            words |= dict.fromkeys(built_in(place.environment).words)
        write_atomically(folder / "demonstrations.jsonl", "".join(demonstrations))
        write_atomically(folder / WORDS, "".join(f"{word}\n" for word in words))

    def made(self, folder: Path, options: AgentsOptions) -> Made:
        from megarlx.data.making import Made, MadeSuite

        identity = hashlib.sha256(options.to_json().encode()).hexdigest()
        suites = {
            place.label: MadeSuite(identity, ("agent",), partial(_tasks, folder / place.label))
            for place in options.environments
        }
        return Made(str(folder / WORDS), suites=suites)


def _tasks(folder: Path, wanted: Wanted) -> Iterator[Line]:
    with (folder / f"tasks_{wanted.split}.jsonl").open(encoding="utf-8") as stream:
        yield from map(json.loads, itertools.islice(stream, wanted.count))


def _words_of(template: TemplateConfig | None) -> list[str]:
    if template is None:
        return []
    parts = (template.system, template.user or "", template.opening, template.assistant)
    return " ".join(parts).replace(PLACE, " ").split()
