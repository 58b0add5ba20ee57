"""What a suite asks: from a JSONL file, or from the run's own synthetic world."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarlx.config.evaluation import SuiteConfig
from megarlx.data.conversations import Conversation, Template, Turn, read_conversations
from megarlx.data.order import key_of, shuffled
from megarlx.data.prompts import FewShot, PromptKeys, read_prompts
from megarlx.study.world import solutions
from megarlx.study.world.world import World
from megarlx.data.tokenizer import Tokenizer

WORLD_QUESTIONS = 256  # where a suite does not say how many
EXAMPLES_FROM = 1_000_000  # a world's examples: training questions that no run comes to


class SuiteError(ValueError):
    """A suite that cannot be computed: which, and why."""


@dataclass(frozen=True)
class Question:
    """`templated`: what a user says; otherwise the whole prompt as it stands."""

    id: str
    text: str
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    templated: bool = True

    def prompt_ids(self, template: Template, tokenizer: Tokenizer) -> list[int]:
        if self.templated:
            return template.prompt_ids((Turn("user", self.text),), tokenizer)
        return tokenizer.encode(self.text)


def questions_of(suite: SuiteConfig, world: World | None) -> list[Question]:
    """Those of a suite that samples."""
    if suite.path is None:
        return _of_world(suite, needed(suite, world))
    found = []
    keys = PromptKeys(suite.question_key, suite.answer_key)
    for number, prompt in enumerate(read_prompts(suite.path, keys)[: suite.questions]):
        metadata = dict(prompt.metadata)
        name, group = metadata.get("id", f"{Path(suite.path).stem}/{number}"), metadata.get("group")
        found.append(
            Question(
                str(name),
                prompt.question,
                prompt.answer,
                metadata,
                None if group is None else str(group),
                suite.templated,
            )
        )
    return checked(suite, found)


def short_enough(
    suite: SuiteConfig,
    questions: list[Question],
    few_shot: FewShot,
    template: Template,
    tokenizer: Tokenizer,
) -> list[Question]:
    """Those whose prompts, with the examples, have no more tokens than the suite allows."""
    if suite.max_prompt_tokens is None:
        return questions
    room = suite.max_prompt_tokens - len(few_shot.ids(template, tokenizer))
    found = [q for q in questions if len(q.prompt_ids(template, tokenizer)) <= room]
    if not found:
        raise SuiteError(
            f"suite {suite.name}: max_prompt_tokens is {suite.max_prompt_tokens}; every prompt "
            "has more"
        )
    return found


def checked(suite: SuiteConfig, found: list[Any]) -> list[Any]:
    """There are some, and each has an id of its own."""
    ids = [entry.id for entry in found]
    if not ids:
        raise SuiteError(f"suite {suite.name}: {suite.path} holds nothing")
    if len(set(ids)) != len(ids):
        double = sorted({i for i in ids if ids.count(i) > 1})
        raise SuiteError(f"suite {suite.name}: {suite.path} uses the id {double[0]!r} twice")
    return found


def needed(suite: SuiteConfig, world: World | None) -> World:
    if world is None:
        raise SuiteError(
            f"suite {suite.name}: world is '{suite.world}', but the run was not trained on a "
            "synthetic world; give it a path"
        )
    return world


def _of_world(suite: SuiteConfig, world: World) -> list[Question]:
    count = suite.questions or WORLD_QUESTIONS
    if suite.world == "behaviours":
        found = []
        for index in range(count):
            request = world.behaviour_prompt(index, "test")
            text, group = request.pop("prompt"), request["behaviour"]
            found.append(Question(f"test/{index}", text, None, request, group, templated=False))
        return found
    half = len(world.settings.steps) / 2
    questions = []
    for index in range(count):
        problem = world.problem(suite.split, index)
        asked = world.question(suite.split, index)
        questions.append(
            Question(
                f"{suite.split}/{index}",
                world.writer.question(problem),
                asked["reference"],
                asked["metadata"],
                "easy" if len(problem.steps) <= half else "hard",
            )
        )
    return questions


def few_shot_of(suite: SuiteConfig, world: World | None, seed: int, *, is_base: bool) -> FewShot:
    """The examples before each question: those of a base model, or of one trained to answer."""
    count = suite.few_shot if is_base else suite.few_shot_trained
    if count == 0:
        return FewShot()
    examples: Sequence[Conversation]
    if suite.path is None:
        examples = _examples_of_world(suite, needed(suite, world), count, seed)
    else:
        assert suite.few_shot_path is not None  # the configuration saw to it
        examples = _examples_of_file(suite, suite.few_shot_path, count, seed)
    return FewShot(tuple(examples), suite.few_shot_separator)


def _examples_of_world(
    suite: SuiteConfig, world: World, count: int, seed: int
) -> list[Conversation]:
    if suite.world != "problems":
        raise SuiteError(f"suite {suite.name}: the world has no examples for '{suite.world}'")
    style = suite.few_shot_style or world.settings.teacher_style
    order = shuffled(1000, key_of(seed, "few shot"))[:count]
    found = []
    for index in order:
        problem = world.problem("train", EXAMPLES_FROM + int(index))
        turns = (
            Turn("user", world.writer.question(problem)),
            Turn("assistant", solutions.checkable(problem, style, world.writer)),
        )
        found.append(Conversation(turns))
    return found


def _examples_of_file(
    suite: SuiteConfig, path: str, count: int, seed: int
) -> Sequence[Conversation]:
    # A file of demonstrations may be long; its first thousand are enough to draw from.
    there = list(itertools.islice(read_conversations(path), 1000))
    if len(there) < count:
        raise SuiteError(
            f"suite {suite.name}: {path} holds {len(there)} examples; {count} are to be shown"
        )
    order = shuffled(len(there), key_of(seed, "few shot"))[:count]
    return [there[int(i)] for i in order]
