"""Every knob of a synthetic world. Shares need not add up to 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Kind = Literal["add", "subtract", "times", "divide", "swap", "table"]
KINDS: tuple[Kind, ...] = ("add", "subtract", "times", "divide", "swap")  # of `operations`
OPERATION_KINDS = ("arithmetic", "table")
Shares = tuple[tuple[str, float], ...]

# How the text puts questions: the template of a model trained on it
QUESTION = "question : {} answer :"

STYLES = ("narrate", "calculate", "plan", "teach", "terse")
MODES = ("checkable", "words", "restate", "chat")
MOST_TABLES = 4900  # invented words for operations
DOCUMENT_KINDS = ("problems", "facts", "stories", "behaviours")


class WorldError(ValueError):
    """Settings that make no world."""


@dataclass(frozen=True)
class Operation:
    """One thing that can happen to a quantity."""

    kind: Kind
    words: tuple[str, ...]
    share: float
    operand: tuple[int, int] = (1, 7)  # drawn evenly, both ends included; not for swap
    at_most: int | None = None  # times in one problem


PLAIN_OPERATIONS = (
    Operation("add", ("buys", "finds", "gets"), 0.45),
    Operation("subtract", ("eats", "loses", "sells"), 0.4),
    Operation("times", ("multiplies",), 0.1, (2, 3), at_most=1),
    Operation("divide", ("shares",), 0.05, (2, 3), at_most=1),
)


@dataclass(frozen=True)
class WorldSettings:
    seed: int = 0

    # Word problems
    operation_kind: Literal["arithmetic", "table"] = "arithmetic"
    names: tuple[str, ...] = ("tom", "ann", "ben", "eva", "max", "lea", "sam", "zoe")
    objects: tuple[str, ...] = ("pears", "plums", "nuts", "coins", "books", "shells")
    times: tuple[str, ...] = (
        *("january", "february", "march", "april", "may", "june", "july"),
        *("august", "september", "october", "november", "december"),
    )
    operations: tuple[Operation, ...] = PLAIN_OPERATIONS
    quantities: int = 2  # an answer is that many numbers: guessing gets harder with each
    answer: Literal["last", "first_and_last"] = "last"  # after the last step, or the first too
    steps: tuple[float, ...] = (1.0,) * 6  # share of problems with 1, 2, 3 … steps; up to 12
    start: tuple[int, int] = (2, 15)
    largest: int = 40  # no value ever goes above, nor below 0
    digits: bool = False  # numbers digit by digit, most significant first; else a word a number
    styles: Shares = (("narrate", 0.35), ("calculate", 0.4), ("plan", 0.2), ("teach", 0.05))
    modes: Shares = (("words", 0.53), ("checkable", 0.15), ("restate", 0.16), ("chat", 0.16))
    several: Shares = (("1", 1.0),)  # how many questions a pre-training document holds
    teacher_style: str = "teach"
    demonstrations_per_question: int = 1
    validation_percent: int = 2  # of all possible questions, kept out of everything else
    test_percent: int = 5

    # Demonstrations in a style that no pre-training text has
    foreign_share: float = 0.0  # of all demonstrations
    foreign_style: str = "terse"

    # With operation_kind = "table", in place of objects, times, operations, start and largest
    tables: int = 10  # operations of a slot
    table_values: int = 12  # that an operation leads to
    slots: int = 4  # a step uses the operations of its own slot
    table_skew: float = 1.0  # an operation's weight is its rank ** -table_skew
    partial_share: float = 0.0  # of a text's steps, left out
    wrong_share: float = 0.0  # of a text's steps, with the fact's one wrong value
    withheld: int = 0  # facts that no text tells
    told_wrongly: int = 0  # facts of which texts tell the wrong value only
    kept_ranks: int = 0  # such facts are of each slot's so many most frequent; 0: of all
    least_told: int = 0  # the other facts of a question about one, by all of the text
    held_out_compositions: float = 0.0  # of whole sequences of operations, of split compositions

    # General knowledge
    entities: int = 96
    attributes: int = 5
    values: int = 12  # of each attribute
    facts_per_document: int = 4
    # How unevenly facts are told: the n-th most frequent one with the weight n ** -fact_skew.
    # At 0 all are alike, and tests of them soon saturate; rare facts are learned late.
    fact_skew: float = 0.0
    choices: int = 4

    # Prompts with a behaviour to follow
    behaviours: Shares = (
        ("repeat", 1.0),
        ("avoid", 1.0),
        ("begin", 1.0),
        ("end", 1.0),
        ("count", 1.0),
    )
    behaviour_followed: float = 0.5  # of those in pre-training documents

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise WorldError(f"world: {problem}")

    def _problems(self) -> list[str]:
        found = []

        def need(good: bool, text: str) -> None:
            if not good:
                found.append(text)

        if not self.is_of_tables:
            need(
                1 <= len(self.steps) <= len(self.times),
                f"steps has {len(self.steps)} entries; allowed 1 to {len(self.times)}, one of the "
                "times names each step",
            )
        need(
            1 <= self.quantities <= len(self.objects),
            f"quantities is {self.quantities}; allowed 1 to {len(self.objects)} objects",
        )
        low, high = self.start
        need(
            0 <= low <= high <= self.largest,
            f"start is {self.start}; both must lie in 0 to largest = {self.largest}, in order",
        )
        need(
            self.answer in ("last", "first_and_last"),
            f"answer is '{self.answer}'; allowed are last, first_and_last",
        )
        need(bool(self.operations), "operations is empty")
        for operation in self.operations:
            name = f"operation {operation.kind}"
            need(operation.kind in KINDS, f"{name}; allowed are {', '.join(KINDS)}")
            need(bool(operation.words), f"{name} has no words")
            least = 2 if operation.kind in ("times", "divide") else 1
            need(
                least <= operation.operand[0] <= operation.operand[1] <= self.largest,
                f"{name}: operand is {operation.operand}; allowed {least} to {self.largest}",
            )
            need(
                operation.kind != "swap" or self.quantities > 1,
                "operation swap needs at least 2 quantities",
            )
        need(
            any(o.at_most is None and o.share > 0 and o.kind != "swap" for o in self.operations),
            "at least one operation other than swap must have no at_most",
        )
        for field, allowed in (("styles", STYLES), ("modes", MODES)):
            unknown = {name for name, _ in getattr(self, field)} - set(allowed)
            need(not unknown, f"{field}: {', '.join(unknown)}; allowed are {', '.join(allowed)}")
        need(self.teacher_style in STYLES, f"teacher_style is '{self.teacher_style}'")
        need(
            all(name.isdigit() and 1 <= int(name) <= 16 for name, _ in self.several),
            f"several is {self.several}; it counts questions, '1' to '16'",
        )
        for field in ("styles", "modes", "several", "behaviours", "steps", "operations"):
            shares = [
                s.share if isinstance(s, Operation) else s[1] if isinstance(s, tuple) else s
                for s in getattr(self, field)
            ]
            need(
                all(s >= 0 for s in shares) and sum(shares) > 0,
                f"{field}: shares are {shares}; they must be at least 0 and not all 0",
            )
        need(
            self.validation_percent >= 1
            and self.test_percent >= 1
            and self.validation_percent + self.test_percent <= 50,
            f"validation_percent is {self.validation_percent}, test_percent {self.test_percent}; "
            "allowed at least 1 each and at most 50 together",
        )
        need(2 <= self.choices <= self.values, f"choices is {self.choices}; 2 to {self.values}")
        need(1 <= self.attributes <= 8, f"attributes is {self.attributes}; allowed 1 to 8")
        need(1 <= self.entities <= 2000, f"entities is {self.entities}; allowed 1 to 2000")
        need(0 <= self.fact_skew <= 4, f"fact_skew is {self.fact_skew}; allowed 0 to 4")
        need(2 <= self.values <= 200, f"values is {self.values}; allowed 2 to 200")
        need(
            0 <= self.behaviour_followed <= 1,
            f"behaviour_followed is {self.behaviour_followed}; allowed 0 to 1",
        )
        return [*found, *self._problems_of_styles(), *_problems_of_tables(self)]

    def _problems_of_styles(self) -> list[str]:
        found, told = [], [name for name, share in self.styles if share > 0]
        if not 0 <= self.foreign_share <= 1:
            found.append(f"foreign_share is {self.foreign_share}; allowed 0 to 1")
        if self.foreign_style not in STYLES:
            found.append(
                f"foreign_style is '{self.foreign_style}'; allowed are {', '.join(STYLES)}"
            )
        if self.foreign_share and self.foreign_style in told:
            left = ", ".join(style for style in STYLES if style not in told)
            found.append(
                f"foreign_style is '{self.foreign_style}', which styles have; allowed are "
                f"{left or 'none'}"
            )
        return found

    @property
    def is_of_tables(self) -> bool:
        return self.operation_kind == "table"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> WorldSettings:
        known = {field.name for field in fields(WorldSettings)}
        if unknown := sorted(set(values) - known):
            raise WorldError(f"world: unknown settings {', '.join(unknown)}")
        made = {key: _frozen(value) for key, value in values.items()}
        if "operations" in values:
            made["operations"] = tuple(
                Operation(**{k: _frozen(v) for k, v in operation.items()})
                for operation in values["operations"]
            )
        return WorldSettings(**made)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


# Settings that only worlds of tables have, beside the shape of the tables.
OF_TABLES = (
    *("partial_share", "wrong_share", "withheld", "told_wrongly", "kept_ranks", "least_told"),
    "held_out_compositions",
)


def _problems_of_tables(made: WorldSettings) -> list[str]:
    if made.operation_kind not in OPERATION_KINDS:
        allowed = ", ".join(OPERATION_KINDS)
        return [f"operation_kind is '{made.operation_kind}'; allowed are {allowed}"]
    if not made.is_of_tables:
        return [
            f"{name} is {getattr(made, name)}; allowed is 0, but with operation_kind 'table'"
            for name in OF_TABLES
            if getattr(made, name)
        ]
    found = []

    def within(name: str, low: float, high: float, why: str = "") -> None:
        value = getattr(made, name)
        if not low <= value <= high:
            found.append(f"{name} is {value}; allowed {low} to {high}{why}")

    within("quantities", 1, 1, " with operation_kind 'table'")
    within("tables", 2, MOST_TABLES)
    within("table_values", 2, MOST_TABLES)
    within("slots", 2, MOST_TABLES)
    if found:
        return found
    if made.slots * made.tables > MOST_TABLES:
        found.append(
            f"slots is {made.slots} and tables {made.tables}; allowed are {MOST_TABLES} "
            "operations in all"
        )
    if not 1 <= len(made.steps) <= made.slots:
        found.append(
            f"steps has {len(made.steps)} entries; allowed 1 to {made.slots}, one of the slots "
            "has the operations of each step"
        )
    within("kept_ranks", 0, made.tables, ", operations of a slot; 0: all")
    within("least_told", 0, 10**9)
    facts = made.slots * (made.kept_ranks or made.tables) ** 2 * made.table_values
    of = f"the facts of kept_ranks = {made.kept_ranks}" if made.kept_ranks else "all facts"
    within("table_skew", 0, 8)
    within("partial_share", 0, 1)
    within("wrong_share", 0, 1)
    if made.partial_share + made.wrong_share > 1:
        found.append(
            f"partial_share is {made.partial_share} and wrong_share {made.wrong_share}; allowed "
            "is a sum of up to 1"
        )
    within("withheld", 0, facts // 2, f", half of {of}")
    within("told_wrongly", 0, facts // 2, f", half of {of}")
    within("held_out_compositions", 0, 0.5)
    return found
