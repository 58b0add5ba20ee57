"""A world: every document, question and test of it, each a pure function of its number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megarlx.data.draw import Draw, Split
from megarlx.data.order import key_of, shuffled
from megarlx.data.tokenizer import WordTokenizer
from megarlx.study.world import behaviours, solutions, stories
from megarlx.study.world.facts import Facts
from megarlx.study.world.problems import Problem, Writer, problem_at
from megarlx.study.world.settings import QUESTION, WorldError, WorldSettings
from megarlx.study.world.tables import tables_of
from megarlx.study.world.tellings import Telling, is_silent, tellings, text_problem


@dataclass(frozen=True)
class ProblemDocument:
    text: str
    told: tuple[Telling, ...]  # of the facts of tables


class World:
    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings
        self.writer = Writer(settings)
        self.facts = Facts(settings)

    @cached_property
    def words(self) -> list[str]:
        """Every word that can occur, in a fixed order."""
        settings = self.settings
        largest, own = settings.largest, settings.objects + settings.times
        operations = settings.operations
        if settings.is_of_tables:
            tables = tables_of(settings)
            largest, own, operations = tables.values - 1, (), tables.operations
        numbers = range(10) if settings.digits else range(largest + 1)
        found = (
            *map(str, numbers),
            *(settings.names + own),
            *(word for operation in operations for word in operation.words),
            *solutions.WORDS,
            *self.facts.vocabulary(),
            *stories.VOCABULARY,
            *behaviours.VOCABULARY,
        )
        return list(dict.fromkeys(found))

    def tokenizer(self) -> WordTokenizer:
        return WordTokenizer(self.words, "world")

    def document(self, kind: str, index: int) -> str:
        """Pre-training text."""
        if kind == "problems":
            return self.problem_document(index).text
        if kind == "facts":
            return self.facts.document(index)
        if kind == "stories":
            return stories.story(self.settings, index)
        if kind == "behaviours":
            return behaviours.behaviour_document(self.settings, index)
        raise WorldError(
            f"world: no documents of kind '{kind}'; allowed problems, facts, stories, behaviours"
        )

    def held_out_document(self, kind: str, index: int) -> str:
        """Text of which training text holds nothing word for word: validation questions, held-out
        paraphrases, and stories of their own draws."""
        if kind == "problems":
            return self.problem_document(index, "validation").text
        if kind == "facts":
            return self.facts.held_out_document(index)
        if kind == "stories":
            return stories.story(self.settings, index, "validation")
        raise WorldError(f"world: no held-out documents of kind '{kind}'")

    def problem_document(self, index: int, split: Split = "train") -> ProblemDocument:
        draw = Draw(self.settings.seed, "document", split, index)
        count = int(draw.share(self.settings.several))
        # In one document one mode: then earlier answers show what kind of answer follows.
        mode, parts, told = draw.share(self.settings.modes), [], []
        for number in range(count):
            problem = text_problem(self.settings, split, index * 16 + number)
            style = draw.share(self.settings.styles)
            own = "chat" if is_silent(problem, self.settings) else mode
            after = solutions.following(problem, own, style, self.writer, draw)
            parts.append(f"{self.prompt(problem)} {after}")
            if self.settings.is_of_tables and own in solutions.TELLING:
                told += tellings(problem, style, self.settings)
        return ProblemDocument(" ".join(parts), tuple(told))

    def problem(self, split: Split, index: int) -> Problem:
        """Question `index` to train on or to be tested with: none of the training text's draws."""
        return problem_at(self.settings, split, index, "questions")

    def prompt(self, problem: Problem) -> str:
        return QUESTION.format(self.writer.question(problem))

    def question(self, split: Split, index: int) -> dict[str, Any]:
        """What RL and evaluation need: a prompt, and what a completion must end with."""
        problem = self.problem(split, index)
        return {
            "prompt": self.prompt(problem),
            "reference": self.writer.answer(problem),
            "metadata": {"steps": len(problem.steps), "split": split, "index": index},
        }

    def demonstrations(self, index: int) -> dict[str, Any]:
        """A training question with solutions: the first in the teacher's style, the others in the
        styles of the pre-training text, no two alike; but some are in the foreign style."""
        return self.solved(self.problem("train", index), index)

    def solved(self, problem: Problem, *number: int | str) -> dict[str, Any]:
        """`number` of the question: styles are drawn by it."""
        draw = Draw(self.settings.seed, "demonstrations", *number)
        others = [name for name, _ in self.settings.styles if name != self.settings.teacher_style]
        styles = [self.settings.teacher_style, *draw.some(others, len(others))]
        if self.settings.demonstrations_per_question > len(styles):
            raise WorldError(
                f"world: demonstrations_per_question is "
                f"{self.settings.demonstrations_per_question}; there are {len(styles)} styles"
            )
        draw, foreign = Draw(self.settings.seed, "foreign", *number), self.settings.foreign_style
        chosen = [
            foreign if draw.uniform() < self.settings.foreign_share else style
            for style in styles[: self.settings.demonstrations_per_question]
        ]
        return {
            "question": self.writer.question(problem),
            "answers": [solutions.checkable(problem, style, self.writer) for style in chosen],
        }

    def few_shot(self, count: int, style: str, seed: int = 0) -> str:
        """`count` solved questions to stand before a prompt, from the training split."""
        order = shuffled(1000, key_of(self.settings.seed, "few shot", seed))[:count]
        parts = []
        for index in order:
            problem = problem_at(self.settings, "train", int(index), "few shot")
            answer = solutions.checkable(problem, style, self.writer)
            parts.append(f"{self.prompt(problem)} {answer} ")
        return "".join(parts)

    def behaviour_prompt(self, index: int, split: str = "train") -> dict[str, Any]:
        request = behaviours.request_at(self.settings, index, split)
        return {
            "prompt": request.text,
            "behaviour": request.behaviour,
            "arguments": dict(request.arguments),
        }

    def capability_tests(self) -> Iterator[dict[str, Any]]:
        return self.facts.tests()


def is_correct(completion: str, reference: str) -> bool:
    """Whether a completion (without its stop token) ends in exactly `#### reference`."""
    before, mark, after = completion.rpartition(solutions.MARK)
    return mark != "" and after.split() == reference.split() and solutions.MARK not in before
