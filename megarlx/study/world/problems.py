"""Word problems: somebody has things, they change step by step, how many are left?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megarlx.data.draw import Draw, Split
from megarlx.data.order import key_of, uniform
from megarlx.study.world.settings import Operation, WorldError, WorldSettings
from megarlx.study.world.tables import Lookup, Tables, tables_of

TRIES = 200


@dataclass(frozen=True)
class Step:
    time: str
    operation: Operation
    word: str
    operand: int  # 0 for swap; of a table its number
    at: int  # which quantity; for swap the first of the two
    other: int | None
    values: tuple[int, ...]  # of all quantities, afterwards
    told: bool = True  # no: left out where the solution is written


@dataclass(frozen=True)
class Problem:
    name: str
    objects: tuple[str, ...]
    start: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.steps[-1].values

    def before(self, at: int) -> tuple[int, ...]:
        return self.steps[at - 1].values if at else self.start

    @property
    def composition(self) -> tuple[int, ...]:
        """Of a problem of tables: what is applied one after the other."""
        return tuple(step.operand for step in self.steps)

    @property
    def lookups(self) -> list[Lookup]:
        """Of a problem of tables: the facts that its steps as they stand are about."""
        return [Lookup(step.operand, self.before(at)[0]) for at, step in enumerate(self.steps)]


class Writer:
    """How numbers and phrases are written in this world."""

    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings

    def number(self, value: int) -> str:
        return " ".join(str(value)) if self.settings.digits else str(value)

    def answer(self, problem: Problem) -> str:
        """`18 , 7` would be longer; digits need the comma to be read at all."""
        between = " , " if self.settings.digits else " "
        return between.join(map(self.number, self.asked(problem)))

    def asked(self, problem: Problem) -> tuple[int, ...]:
        """What the question wants to know."""
        if self.settings.answer == "first_and_last":
            return problem.steps[0].values + problem.answer
        return problem.answer

    def things(self, problem: Problem, values: Sequence[int]) -> str:
        pairs = zip(values, problem.objects, strict=True)
        return " and ".join(f"{self.number(v)} {o}".rstrip() for v, o in pairs)

    def step(self, problem: Problem, step: Step) -> str:
        """`may buys 4 pears`; with one quantity the object goes without saying."""
        if step.operation.kind == "table":
            return step.word
        several = len(problem.objects) > 1
        thing = f" {problem.objects[step.at]}" if several else ""
        if step.operation.kind == "swap":
            assert step.other is not None
            return f"{step.time} {step.word}{thing} with {problem.objects[step.other]}"
        by = " by" if step.operation.kind in ("times", "divide") else ""
        return f"{step.time} {step.word}{by} {self.number(step.operand)}{thing}"

    def question(self, problem: Problem) -> str:
        if self.settings.is_of_tables:
            words = (step.word for step in problem.steps)
            start = self.things(problem, problem.start)
            return " . ".join((f"{problem.name} has {start}", *words)) + " ?"
        steps = "".join(f" {self.step(problem, step)} ." for step in problem.steps)
        several = self.settings.answer == "first_and_last"
        how_many = "how many first and last" if several else "how many"
        return f"{problem.name} has {self.things(problem, problem.start)} .{steps} {how_many} ?"


def problem_at(settings: WorldSettings, split: Split, index: int, stream: str) -> Problem:
    """Problem `index` of a stream (training text, questions to train on …) of a split.

    Which split a question belongs to is a function of its text: a test question can appear in no
    training stream, without any list of them.
    """
    writer = Writer(settings)
    draw = Draw(settings.seed, "problem", split, stream, index)
    if split == "compositions" and not settings.held_out_compositions:
        raise WorldError("world: there is no split 'compositions'; held_out_compositions is 0")
    make = _draw_table_problem if settings.is_of_tables else _draw_problem
    for _ in range(TRIES * 100):
        problem = make(settings, draw)
        if settings.is_of_tables and not _is_open(settings, problem, split, stream):
            continue
        if split == "compositions" or split_of(settings, writer.question(problem)) == split:
            return problem
    raise WorldError(f"world: no question of split '{split}' was found: there are too few")


def split_of(settings: WorldSettings, question: str) -> Split:
    bucket = key_of(settings.seed, "split", question) % 100
    if bucket < settings.test_percent:
        return "test"
    return "validation" if bucket < settings.test_percent + settings.validation_percent else "train"


def is_held_out(settings: WorldSettings, problem: Problem) -> bool:
    """Whether the whole sequence of operations is one that only split compositions has."""
    share = settings.held_out_compositions
    several = len(problem.steps) > 1
    return several and uniform(settings.seed, "composition", *problem.composition) < share


def _is_open(settings: WorldSettings, problem: Problem, split: Split, stream: str) -> bool:
    """Whether a problem of tables may be drawn there."""
    if is_held_out(settings, problem) != (split == "compositions"):
        return False
    tables = tables_of(settings)
    closed = tables.withheld if stream == "text" else tables.withheld | tables.told_wrongly
    return not closed or closed.isdisjoint(map(tables.number, problem.lookups))


def _draw_table_problem(settings: WorldSettings, draw: Draw) -> Problem:
    tables = tables_of(settings)
    count = draw.weighted(range(1, len(settings.steps) + 1), settings.steps)
    start, operations = tables.start(draw), []
    for slot in range(1, count + 1):
        operations.append(tables.operation(draw, slot))
    return table_problem(tables, draw.one(settings.names), start, operations)


def table_problem(tables: Tables, name: str, start: int, operations: Sequence[int]) -> Problem:
    value, steps = start, []
    for number in operations:
        value = tables.result(Lookup(number, value))
        operation = tables.operations[number]
        steps.append(Step("", operation, operation.words[0], number, 0, None, (value,)))
    return Problem(name, ("",), (start,), tuple(steps))


def _draw_problem(settings: WorldSettings, draw: Draw) -> Problem:
    count = draw.weighted(range(1, len(settings.steps) + 1), settings.steps)
    objects = tuple(draw.some(settings.objects, settings.quantities))
    start = tuple(draw.between(*settings.start) for _ in objects)
    values, used, steps = start, Counter[str](), []
    for number in range(count):
        step = _draw_step(settings, draw, settings.times[number], values, used)
        used[step.operation.kind] += 1
        values = step.values
        steps.append(step)
    return Problem(draw.one(settings.names), objects, start, tuple(steps))


def _draw_step(
    settings: WorldSettings, draw: Draw, time: str, values: tuple[int, ...], used: Counter[str]
) -> Step:
    open_operations = [
        operation
        for operation in settings.operations
        if operation.at_most is None or used[operation.kind] < operation.at_most
    ]
    shares = [operation.share for operation in open_operations]
    for _ in range(TRIES):
        operation = draw.weighted(open_operations, shares)
        at, other, operand = draw.below(len(values)), None, 0
        if operation.kind == "swap":
            other = (at + 1 + draw.below(len(values) - 1)) % len(values)
        else:
            operand = draw.between(*operation.operand)
        after = _apply(operation, values, at, other, operand, settings.largest)
        if after is not None:
            return Step(time, operation, draw.one(operation.words), operand, at, other, after)
    raise WorldError(
        f"world: no operation leads from {values} to values in 0 to {settings.largest}; "
        "the operands are too large for it"
    )


def _apply(
    operation: Operation,
    values: tuple[int, ...],
    at: int,
    other: int | None,
    operand: int,
    largest: int,
) -> tuple[int, ...] | None:
    """The values afterwards; None where the step cannot be taken."""
    after = list(values)
    if operation.kind == "swap":
        assert other is not None
        after[at], after[other] = after[other], after[at]
        return tuple(after)
    value = after[at]
    if operation.kind == "divide" and value % operand:
        return None
    after[at] = {
        "add": value + operand,
        "subtract": value - operand,
        "times": value * operand,
        "divide": value // operand,
    }[operation.kind]
    return tuple(after) if 0 <= after[at] <= largest else None


@lru_cache(maxsize=8)
def guesses(settings: WorldSettings, questions: int = 4000) -> tuple[tuple[int, ...], ...]:
    """Answers as they are distributed over this world's questions."""
    writer = Writer(settings)
    drawn = (problem_at(settings, "train", i, "guessing") for i in range(questions))
    return tuple(writer.asked(problem) for problem in drawn)


def guessing_pass_at_k(settings: WorldSettings, k: int, questions: int = 4000) -> float:
    """pass@k of a model that ignores the question and draws answers from their distribution.

    Each question's own answer is left out of the counts: an answer seen once is then worth
    nothing, instead of 1 / questions too much.
    """
    counts = Counter(guesses(settings, questions))
    solved = sum(c * (1 - (1 - (c - 1) / (questions - 1)) ** k) for c in counts.values())
    return solved / questions
