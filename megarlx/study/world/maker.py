"""The synthetic world as a data maker: `[data] maker = "world"`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from megarlx.config.evaluation import SuiteConfig
from megarlx.config.objectives import PLACE, TemplateConfig
from megarlx.config.run_sections import SourceConfig
from megarlx.config.section import Section
from megarlx.study.world.settings import QUESTION, WorldError, WorldSettings

if TYPE_CHECKING:  # a configuration that names this maker is read without numpy
    from megarlx.data.making import Made
    from megarlx.study.world.files import Sizes


class WorldOptions(Section):
    """A world, and how much of it is written."""

    seed: int = Field(default=0, ge=0, description="Seed of the world: its facts and its problems")
    documents: int = Field(
        default=40_000, ge=1, description="Training documents, shared out by the kinds' weights"
    )
    held_out_documents: int = Field(
        default=500, ge=1, description="Validation documents of each kind"
    )
    problems_share: float = Field(default=0.52, ge=0, description="Share of word problems")
    facts_share: float = Field(default=0.38, ge=0, description="Share of general knowledge")
    stories_share: float = Field(default=0.10, ge=0, description="Share of short stories")
    prompts: int = Field(default=1024, ge=1, description="Questions in prompts.jsonl, to learn on")
    test_questions: int = Field(
        default=256, ge=1, description="Questions in test.jsonl and in validation.jsonl each"
    )
    settings: dict[str, Any] = Field(
        default={}, description="Knobs of the world by name; docs/data.md lists them"
    )

    @field_validator("settings")
    @classmethod
    def _but_defaults(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """A knob that is told its default is one that is not told."""
        usual = json.loads(json.dumps(WorldSettings().to_json())) | {"seed": None}
        return {key: v for key, v in settings.items() if key not in usual or usual[key] != v}

    @property
    def world(self) -> WorldSettings:
        return WorldSettings.from_json({"seed": self.seed, **self.settings})

    @property
    def shares(self) -> dict[str, float]:
        return {
            "problems": self.problems_share,
            "facts": self.facts_share,
            "stories": self.stories_share,
        }

    def problems(self) -> list[tuple[str, str]]:
        try:
            _ = self.world
        except (WorldError, TypeError) as error:
            return [("settings", f"make no world: {error}")]
        if not sum(self.shares.values()) > 0:
            return [("problems_share", "and the other shares are 0: there is nothing to write")]
        return []


class WorldMaker:
    Options = WorldOptions
    template: ClassVar[TemplateConfig | None] = TemplateConfig(user=QUESTION.format(PLACE))
    evaluated = (
        SuiteConfig(name="problems", kind="pass_at_k", made="problems", max_new_tokens=70),
        SuiteConfig(name="facts_choice", kind="choice", made="held_out_facts"),
        SuiteConfig(name="facts_cloze", kind="cloze", made="held_out_facts"),
        SuiteConfig(name="stories", kind="perplexity", made="stories"),
    )

    def write(self, folder: Path, options: WorldOptions) -> None:
        from megarlx.study.world.files import write_world

        write_world(options.world, folder, sizes_of(options))

    def made(self, folder: Path, options: WorldOptions) -> Made:
        from megarlx.data.making import Made
        from megarlx.study.world.suites import suites_of
        from megarlx.study.world.tellings import Counts
        from megarlx.study.world.world import World

        def source(kind: str, name: str, weight: float = 1.0) -> SourceConfig:
            return SourceConfig(name=name, prefix=str(folder / f"{kind}_{name}"), weight=weight)

        counts = Counts.read(folder) if options.world.is_of_tables else None
        return Made(
            str(folder / "tokenizer.json"),
            tuple(source("documents", n, share) for n, share in options.shares.items() if share),
            tuple(source("held_out", name) for name in options.shares),
            suites_of(World(options.world), counts),
        )


def sizes_of(options: WorldOptions) -> Sizes:
    from megarlx.study.world.files import Sizes

    shares = {kind: share for kind, share in options.shares.items() if share > 0}
    total = sum(options.shares.values())
    documents = {k: max(1, round(options.documents * s / total)) for k, s in shares.items()}
    return Sizes(documents, options.held_out_documents, options.prompts, options.test_questions)
