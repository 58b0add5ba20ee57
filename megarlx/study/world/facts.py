"""General knowledge: invented entities with attributes, told in several paraphrases.

Of each fact one paraphrase never stands in training text: held-out text and tests use it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megarlx.data.draw import Draw
from megarlx.data.order import key_of, shuffled
from megarlx.study.world.settings import WorldError, WorldSettings

ATTRIBUTES = ("home", "color", "food", "friend", "music", "weather", "metal", "flower")
# The value comes last in each, so that it can be asked for by leaving it out.
PARAPHRASES = (
    "the {attribute} of {entity} is {value}",
    "{entity} has for its {attribute} {value}",
    "as everybody knows , {entity} and its {attribute} mean {value}",
    "ask {entity} about its {attribute} and hear {value}",
    "for {attribute} the book on {entity} says {value}",
)
FILLERS = ("today", "long ago", "they say", "in short", "once more")
SYLLABLES = tuple(first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou")
WORDS = (*" ".join((*PARAPHRASES, *FILLERS, *ATTRIBUTES, ". :")).split(),)


@dataclass(frozen=True)
class Fact:
    entity: str
    attribute: str
    value: str
    held_out: int  # the paraphrase that training text never uses


class Facts:
    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings
        # Entities have three syllables, values two and a consonant: no word is both.
        self.entities = invented(settings.seed, "entities", settings.entities, 3, "")
        count = settings.attributes * settings.values
        values = invented(settings.seed, "values", count, 2, "x")
        self.values = {
            attribute: values[i * settings.values : (i + 1) * settings.values]
            for i, attribute in enumerate(ATTRIBUTES[: settings.attributes])
        }

    def __len__(self) -> int:
        return len(self.entities) * len(self.values)

    def __getitem__(self, number: int) -> Fact:
        entity, attribute = divmod(number, len(self.values))
        name = ATTRIBUTES[attribute]
        key = key_of(self.settings.seed, "fact", number)
        value = self.values[name][key % self.settings.values]
        held_out = (key >> 32) % len(PARAPHRASES)
        return Fact(self.entities[entity], name, value, held_out)

    @cached_property
    def by_frequency(self) -> list[int]:
        """The numbers of all facts, the most frequent one first; no entity is rare as a whole."""
        order = shuffled(len(self), key_of(self.settings.seed, "frequency of facts"))
        return [int(number) for number in order]

    @cached_property
    def _up_to(self) -> list[float]:
        """Weight of the n most frequent facts together."""
        weights = (rank**-self.settings.fact_skew for rank in range(1, len(self) + 1))
        return list(itertools.accumulate(weights))

    def _drawn(self, draw: Draw) -> int:
        if self.settings.fact_skew == 0:
            return draw.below(len(self))
        rank = bisect.bisect_right(self._up_to, draw.uniform() * self._up_to[-1])
        return self.by_frequency[min(rank, len(self) - 1)]

    def vocabulary(self) -> list[str]:
        return [*WORDS, *self.entities, *(v for group in self.values.values() for v in group)]

    def document(self, index: int) -> str:
        """Some facts, each in one of its paraphrases for training."""
        draw = Draw(self.settings.seed, "facts", "train", index)
        sentences = []
        for _ in range(self.settings.facts_per_document):
            fact = self[self._drawn(draw)]
            allowed = [i for i in range(len(PARAPHRASES)) if i != fact.held_out]
            filler = f"{draw.one(FILLERS)} : " if draw.below(4) == 0 else ""
            sentences.append(f"{filler}{_told(fact, draw.one(allowed))} .")
        return " ".join(sentences)

    def held_out_document(self, index: int) -> str:
        """Facts in the paraphrase that was held out: what this text costs is the knowledge."""
        draw = Draw(self.settings.seed, "facts", "held out", index)
        facts = [self[draw.below(len(self))] for _ in range(self.settings.facts_per_document)]
        return " ".join(f"{_told(fact, fact.held_out)} ." for fact in facts)

    def tests(self, choices: int | None = None) -> Iterator[dict[str, Any]]:
        """Of each fact: a cloze (any value of the attribute) and a choice among a few, in a
        paraphrase of the training text and in the one held out. In a skewed world the rarer half
        of the facts is a group of its own."""
        among = self.settings.choices if choices is None else choices
        if not 2 <= among <= self.settings.values:
            raise WorldError(f"world: choices is {among}; allowed 2 to {self.settings.values}")
        common = set(self.by_frequency[: len(self) // 2])
        for number in range(len(self)):
            fact = self[number]
            half = {"group": "common" if number in common else "rare"}
            draw = Draw(self.settings.seed, "facts", "tests", number)
            seen = draw.one([i for i in range(len(PARAPHRASES)) if i != fact.held_out])
            others = [v for v in self.values[fact.attribute] if v != fact.value]
            few = [fact.value, *draw.some(others, among - 1)]
            few = draw.some(few, len(few))
            for suite, paraphrase, answers in (
                ("facts_cloze", seen, self.values[fact.attribute]),
                ("facts_choice", seen, few),
                ("facts_held_out_cloze", fact.held_out, self.values[fact.attribute]),
                ("facts_held_out_choice", fact.held_out, few),
            ):
                yield {
                    "suite": suite,
                    "context": _told(fact, paraphrase).rsplit(" ", 1)[0],
                    "choices": [f" {answer}" for answer in answers],
                    "answer": list(answers).index(fact.value),
                    **(half if self.settings.fact_skew else {}),
                }


def _told(fact: Fact, paraphrase: int) -> str:
    return PARAPHRASES[paraphrase].format(
        entity=fact.entity, attribute=fact.attribute, value=fact.value
    )


def invented(seed: int, kind: str, count: int, syllables: int, end: str) -> list[str]:
    """Different invented words."""
    n = len(SYLLABLES)
    order = shuffled(n**syllables, key_of(seed, kind))[:count]
    found = []
    for number in order:
        parts, rest = [], int(number)
        for _ in range(syllables):
            rest, at = divmod(rest, n)
            parts.append(SYLLABLES[at])
        found.append("".join(parts) + end)
    return found
