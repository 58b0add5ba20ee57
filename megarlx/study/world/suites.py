"""What can be asked of a world, as lines of an evaluation suite's file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from megarlx.data.conversations import Conversation, Turn
from megarlx.data.draw import Split
from megarlx.data.making import Line, MadeSuite, Wanted
from megarlx.data.order import key_of, shuffled
from megarlx.study.world import solutions
from megarlx.study.world.lookups import lookup_lines
from megarlx.study.world.problems import guesses
from megarlx.study.world.settings import WorldSettings
from megarlx.study.world.tellings import Counts
from megarlx.study.world.world import World

COUNT = 256  # of questions, prompts and documents, where a suite does not say how many
EXAMPLES_FROM = 1_000_000  # examples are training questions that no run comes to
TESTS = ("choice", "cloze")


def suites_of(world: World, counts: Counts | None = None) -> dict[str, MadeSuite]:
    """`counts`: of what was written of a world of tables, to be asked of it."""
    settings = json.dumps(world.settings.to_json(), sort_keys=True)
    make = partial(MadeSuite, hashlib.sha256(settings.encode()).hexdigest())
    found = {
        "problems": make(
            ("pass_at_k", "perplexity"),
            partial(_problems, world),
            guesses=lambda: guesses(world.settings),
            examples=partial(_examples, world),
            reward="marked_answer",
            options=("style",),
            splits=splits_of(world.settings),
        ),
        "facts": make((*TESTS, "perplexity"), partial(_facts, world), options=("choices",)),
        "held_out_facts": make(TESTS, partial(_tests, world, "held_out_"), options=("choices",)),
        "stories": make(("perplexity",), partial(_documents, world, "stories")),
        "behaviours": make(
            ("behaviour",), partial(_behaviours, world), reward="world_behaviour", templated=False
        ),
    }
    if counts is not None:
        found["lookups"] = MadeSuite(
            hashlib.sha256(f"{settings} {counts.to_json()}".encode()).hexdigest(),
            ("lookups",),
            partial(lookup_lines, world, counts, COUNT),
            options=("style", "facts"),
            splits=splits_of(world.settings),
        )
    return found


def splits_of(settings: WorldSettings) -> tuple[Split, ...]:
    own: tuple[Split, ...] = ("compositions",) if settings.held_out_compositions else ()
    return ("validation", "test", *own)


def _problems(world: World, wanted: Wanted) -> Iterator[Line]:
    if wanted.kind == "perplexity":
        yield from _documents(world, "problems", wanted)
        return
    half = len(world.settings.steps) / 2
    for index in range(wanted.count or COUNT):
        problem = world.problem(wanted.split, index)
        yield {
            "id": f"{wanted.split}/{index}",
            "group": "easy" if len(problem.steps) <= half else "hard",
            "question": world.writer.question(problem),
            "answer": world.writer.answer(problem),
            "steps": len(problem.steps),
            "split": wanted.split,
            "index": index,
        }


def _facts(world: World, wanted: Wanted) -> Iterator[Line]:
    if wanted.kind == "perplexity":
        return _documents(world, "facts", wanted)
    return _tests(world, "", wanted)


def _tests(world: World, paraphrase: str, wanted: Wanted) -> Iterator[Line]:
    tests = world.facts.tests(wanted.options.get("choices"))
    own = (t for t in tests if t["suite"] == f"facts_{paraphrase}{wanted.kind}")
    for number, test in enumerate(own):
        yield {"id": f"fact/{number}", **test}


def _documents(world: World, kind: str, wanted: Wanted) -> Iterator[Line]:
    for index in range(wanted.count or COUNT):
        yield {"id": f"held_out/{index}", "text": world.held_out_document(kind, index)}


def _behaviours(world: World, wanted: Wanted) -> Iterator[Line]:
    for index in range(wanted.count or COUNT):
        asked = world.behaviour_prompt(index, "test")
        question, group = asked.pop("prompt"), asked["behaviour"]
        yield {"id": f"test/{index}", "group": group, "question": question, **asked}


def _examples(
    world: World, count: int, seed: int, options: Mapping[str, Any]
) -> list[Conversation]:
    style = options.get("style") or world.settings.teacher_style
    found = []
    for index in shuffled(1000, key_of(seed, "few shot"))[:count]:
        problem = world.problem("train", EXAMPLES_FROM + int(index))
        turns = (
            Turn("user", world.writer.question(problem)),
            Turn("assistant", solutions.checkable(problem, style, world.writer)),
        )
        found.append(Conversation(turns))
    return found
