"""What every kind of suite is given, and what it gives back.

A kind is a function from Asked to Measured, called by all ranks, with the same answer on each.
Those of kinds.py are added as a user's own are: by a name, `kind = "module:function"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megarlx.config.evaluation import EvaluationConfig, SuiteConfig
from megarlx.config.objectives import PLACE, WRITE_TEMPLATE, unknown_template
from megarlx.data.conversations import Frames, Template
from megarlx.data.making import Made, MadeSuite
from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation.questions import SuiteError, made_suite
from megarlx.model.build import ParallelModel

Progress = Callable[[int, int], None]  # questions done, of all


@dataclass(frozen=True)
class Subject:
    """What is measured. A `base` model has seen pre-training only, and is shown examples."""

    model: ParallelModel
    tokenizer: Tokenizer
    template: Template | None  # None: nobody has said how this model is asked
    is_base: bool
    iteration: int
    trunk_tokens: int
    digest: str = ""  # of the checkpoint; empty for weights that are being trained
    made: Made | None = None
    templates: Mapping[str, Template] = field(default_factory=dict)  # others, by name

    def template_of(self, suite: SuiteConfig) -> Template | None:
        if suite.template is None:
            return self.template
        if suite.template not in self.templates:
            wrong = unknown_template(suite.template, self.templates)
            raise SuiteError(f"suite {suite.name}: template {wrong}")
        return self.templates[suite.template]


@dataclass(frozen=True)
class Asked:
    """A suite, asked of a subject."""

    subject: Subject
    config: EvaluationConfig
    suite: SuiteConfig
    progress: Progress | None = None  # where somebody looks

    @property
    def made(self) -> MadeSuite | None:
        """What the suite asks of the run's made data, if it does."""
        if self.suite.made is None:
            return None
        return made_suite(self.suite, self.subject.made)

    @property
    def template(self) -> Template:
        found, suite = self.subject.template_of(self.suite), self.suite
        if found is None and suite.uses_template:
            raise SuiteError(
                f"suite {suite.name}: it asks in a template, and this model has none; "
                f"{WRITE_TEMPLATE}"
            )
        return found or Frames(user=PLACE)  # nothing is written in it


@dataclass(frozen=True)
class Measured:
    """Metrics by name, and an item {"id", …} for each question.

    Where items of a kind have "correct" (true or false, or how many of "samples"), reports follow
    single questions through a training.
    """

    metrics: Mapping[str, float]
    items: Sequence[Mapping[str, Any]]
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    guessing: Mapping[str, float] | None = None  # the metrics that need no model
    samples: Sequence[Mapping[str, Any]] = ()  # to be read
