"""How well single facts of a world of tables are known: a suite kind, and what it is asked.

A problem is solved where its lookups are known. Each is asked behind the right solution up to its
value, in the styles of the pre-training text; what is measured is the probability of the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from megarlx.data.making import Line, Wanted
from megarlx.evaluation.capability import continuation, score_texts
from megarlx.evaluation.interface import Asked, Measured
from megarlx.evaluation.questions import SuiteError, made_lines
from megarlx.study.world import solutions
from megarlx.study.world.kept import BESIDE, GROUPS, KeptFacts
from megarlx.study.world.problems import Problem
from megarlx.study.world.settings import STYLES
from megarlx.study.world.tables import Tables, tables_of
from megarlx.study.world.tellings import Counts
from megarlx.study.world.world import World


def band(count: int) -> str:
    """The powers of two that a number of tellings lies between."""
    if count == 0:
        return "told_0"
    if count == 1:
        return "told_1"
    low = 1 << (count.bit_length() - 1)
    return f"told_{low}_to_{2 * low - 1}"


def lookup_lines(world: World, counts: Counts, count: int, wanted: Wanted) -> Iterator[Line]:
    """A line a lookup: the contexts in which the answer should follow, one a style."""
    tables, styles = tables_of(world.settings), _styles(world, wanted)
    facts = wanted.options.get("facts")
    if facts is not None:
        yield from _kept_lines(world, counts, wanted.count or count, facts, styles)
        return
    for index in range(wanted.count or count):
        problem, name = world.problem(wanted.split, index), f"{wanted.split}/{index}"
        yield from _lines_of(world, problem, name, styles, counts, tables)


def _kept_lines(
    world: World, counts: Counts, count: int, facts: str, styles: Sequence[str]
) -> Iterator[Line]:
    """Only the steps of the kept facts in questions to test with; or the others in those that RL
    trains on."""
    group = facts.removeprefix(BESIDE)
    if group not in GROUPS:
        allowed = ", ".join((*GROUPS, *(f"{BESIDE}{name}" for name in GROUPS)))
        raise SuiteError(f"lookups: facts is {facts!r}; allowed are {allowed}")
    kept, tables = KeptFacts(world, counts, group), tables_of(world.settings)
    for index, (number, problem) in enumerate(kept.test(count) if group == facts else kept.train):
        lines = _lines_of(world, problem, f"{facts}/{index}", styles, counts, tables)
        for at, line in zip(problem.lookups, lines, strict=True):
            if (tables.number(at) == number) == (group == facts):
                yield line


def _lines_of(
    world: World, problem: Problem, name: str, styles: Sequence[str], counts: Counts, tables: Tables
) -> Iterator[Line]:
    prompt = world.prompt(problem)
    before = [solutions.before_lookups(problem, style, world.writer) for style in styles]
    for at, (lookup, step) in enumerate(zip(problem.lookups, problem.steps, strict=True)):
        yield {
            "id": f"{name}/{at}",
            "question": name,
            "group": band(counts.right[tables.number(lookup)]),
            "contexts": [f"{prompt} {texts[at]}" for texts in before],
            "answer": " " + world.writer.number(step.values[0]),
        }


def _styles(world: World, wanted: Wanted) -> list[str]:
    told = [name for name, share in world.settings.styles if share > 0]
    style = wanted.options.get("style")
    if style is None:
        return told
    if style not in STYLES:
        raise SuiteError(f"lookups: style is {style!r}; allowed are {', '.join(STYLES)}")
    return [style]


def lookups(asked: Asked) -> Measured:
    """The mean probability of the right value: of all lookups, and by how often text tells them."""
    model, tokenizer = asked.subject.model, asked.subject.tokenizer
    if asked.suite.made is None:
        raise SuiteError(f"suite {asked.suite.name}: kind lookups asks what is made; give it made")
    lines = list(made_lines(asked.suite, asked.subject.made))
    longest = model.config.max_sequence_length
    texts = [
        continuation(tokenizer, context, line["answer"], longest)
        for line in lines
        for context in line["contexts"]
    ]
    scores = iter(score_texts(model, texts, tokens_per_pass=asked.config.tokens_per_pass))
    items = []
    for line in lines:
        own = [math.exp(next(scores).logprob) for _ in line["contexts"]]
        kept = {key: line[key] for key in ("id", "question", "group")}
        items.append({**kept, "probability": math.fsum(own) / len(own)})
    return _measured(items)


def _measured(items: Sequence[dict[str, Any]]) -> Measured:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    groups = sorted({item["group"] for item in items}, key=lambda name: int(name.split("_")[1]))
    for group in (None, *groups):
        own = [item for item in items if group in (None, item["group"])]
        name = "probability" if group is None else f"probability_{group}"
        mean = metrics[name] = math.fsum(item["probability"] for item in own) / len(own)
        error = _error(mean, own)
        errors |= {} if error is None else {name: error}
    return Measured(metrics, items, errors)


def _error(mean: float, items: Sequence[dict[str, Any]]) -> float | None:
    """Lookups of a question are not independent: the error is that of a mean over questions."""
    away: dict[str, float] = {}
    for item in items:
        away[item["question"]] = away.get(item["question"], 0.0) + item["probability"] - mean
    count = len(away)
    if count < 2:
        return None
    spread = math.fsum(value * value for value in away.values())
    return math.sqrt(spread * count / (count - 1)) / len(items)
