"""What a suite asks: from a JSONL file, or from what the run's data maker made."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarlx.config.evaluation import SCORED, EvaluationConfig, SuiteConfig
from megarlx.data.conversations import Conversation, Template, Turn, read_conversations
from megarlx.data.making import Line, Made, MadeSuite, Wanted
from megarlx.data.order import key_of, shuffled
from megarlx.data.prompts import FewShot, PromptKeys, prompt_of, read_prompts
from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation.readiness import PROBE


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
    before: tuple[Turn, ...] = ()  # turns that the question follows

    def prompt_ids(
        self, template: Template, tokenizer: Tokenizer, *, follows: bool = False
    ) -> list[int]:
        """`follows`: behind solved examples."""
        if self.templated:
            turns = (*self.before, Turn("user", self.text))
            return template.prompt_ids(turns, tokenizer, follows=follows)
        ids = tokenizer.encode(self.text, inside=follows)
        return ids if follows else tokenizer.begun(ids)


def questions_of(suite: SuiteConfig, made: Made | None) -> list[Question]:
    """Those of a suite that samples."""
    if suite.path is None:
        keys, where = PromptKeys(), f"made {suite.made}"
        prompts = [prompt_of(dict(line), keys) for line in made_lines(suite, made)]
    else:
        asks, where = suite.environment is None, Path(suite.path).stem
        keys = PromptKeys(suite.question_key, suite.answer_key, needs_question=asks)
        prompts = [*read_prompts(suite.path, keys)]
    found = []
    for number, prompt in enumerate(prompts[: suite.questions]):
        if isinstance(prompt, str):
            raise SuiteError(f"suite {suite.name}: line {number + 1} of {where} {prompt}")
        if prompt.before and (suite.environment is not None or not suite.templated):
            why = "what stands before a question has a place in a template only"
            raise SuiteError(f"suite {suite.name}: line {number + 1} of {where}: {why}")
        metadata = dict(prompt.metadata)
        name, group = metadata.get("id", f"{where}/{number}"), metadata.get("group")
        found.append(
            Question(
                str(name),
                prompt.question,
                prompt.answer,
                metadata,
                None if group is None else str(group),
                suite.templated,
                prompt.before,
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
    shots = len(few_shot.ids(template, tokenizer))
    room, follows = suite.max_prompt_tokens - shots, shots > 0
    found = [
        q for q in questions if len(q.prompt_ids(template, tokenizer, follows=follows)) <= room
    ]
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
        raise SuiteError(f"suite {suite.name}: {suite.path or suite.made} holds nothing")
    if len(set(ids)) != len(ids):
        double = sorted({i for i in ids if ids.count(i) > 1})
        raise SuiteError(
            f"suite {suite.name}: {suite.path or suite.made} uses the id {double[0]!r} twice"
        )
    return found


def made_suite(suite: SuiteConfig, made: Made | None) -> MadeSuite:
    """What is asked of what the run's maker made, and can be."""
    if made is None:
        why = "but the run's [data] names no maker; give it a path"
    elif (found := made.suites.get(suite.made or "")) is None:
        why = f"allowed are {', '.join(made.suites) or 'none'}"
    elif suite.is_ours and suite.kind not in found.kinds:
        why = f"which is for the kinds {', '.join(found.kinds)}, not for {suite.kind}"
    elif suite.is_ours and (unknown := [key for key in suite.options if key not in found.options]):
        why = f"whose options are {', '.join(found.options) or 'none'}, not {unknown[0]}"
    elif suite.split not in found.splits:
        why = f"whose splits are {', '.join(found.splits)}, not {suite.split}"
    elif suite.kind in SCORED and suite.templated and not found.templated:
        why = "whose questions are asked as they stand: templated = false"
    else:
        return found
    raise SuiteError(f"suite {suite.name}: made is '{suite.made}', {why}")


def made_lines(suite: SuiteConfig, made: Made | None) -> Iterable[Line]:
    wanted = Wanted(suite.kind, suite.questions, suite.split, suite.options)
    return made_suite(suite, made).lines(wanted)


def check_suites(evaluation: EvaluationConfig, made: Made | None) -> None:
    """Before a run begins: what its suites ask for is there."""
    for suite in evaluation.suites:
        if suite.made is not None:
            made_suite(suite, made)


def few_shot_of(suite: SuiteConfig, made: Made | None, seed: int, *, is_base: bool) -> FewShot:
    """The examples before each question: those of a base model, or of one trained to answer."""
    count = suite.few_shot if is_base else suite.few_shot_trained
    if count == 0:
        return FewShot()
    examples: Sequence[Conversation]
    if suite.path is None:
        make = made_suite(suite, made).examples
        if make is None:
            raise SuiteError(f"suite {suite.name}: there are no examples for '{suite.made}'")
        examples = make(count, seed, suite.options)
    else:
        assert suite.few_shot_path is not None  # the configuration saw to it
        examples = _examples_of_file(suite, suite.few_shot_path, count, seed)
    return FewShot(tuple(examples), suite.few_shot_separator)


def _examples_of_file(
    suite: SuiteConfig, path: str, count: int, seed: int
) -> Sequence[Conversation]:
    """Those of the file that the suite does not ask: shown with its answer, a question tests
    nothing. A probe shows what RL shows."""
    # A file of demonstrations may be long; its first thousand are enough to draw from.
    held = list(itertools.islice(read_conversations(path), 1000))
    asks = [] if suite.name.endswith(PROBE) else questions_of(suite, None)
    asked = {question.text for question in asks}
    there = [one for one in held if not (one.question and one.question[-1].content in asked)]
    if len(there) < count:
        beside = " beside questions of the suite itself" if len(there) < len(held) else ""
        raise SuiteError(
            f"suite {suite.name}: {path} holds {len(there)} examples{beside}; "
            f"{count} are to be shown"
        )
    order = shuffled(len(there), key_of(seed, "few shot"))[:count]
    return [there[int(i)] for i in order]
