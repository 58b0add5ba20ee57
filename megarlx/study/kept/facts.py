"""What is known, by arm, of facts that only early RL saw and of facts that text tells wrongly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megarlx.report.measures import Ratio, ratio_of_means
from megarlx.report.runs import Run
from megarlx.report.student import TrunkInterval, interval_of_trunks
from megarlx.study.kept.arms import BESIDE, TOLD_WRONGLY, WITHHELD, Arms, known, rl_steps

LEARNED, KNOWN_BESIDE = 20.0, 90.0  # points: what the manipulation has to reach
MIDDLE, RL_MIDDLE, END = "trunk, middle", "RL in the middle", "trunk's end"
BASES = (MIDDLE, RL_MIDDLE, END)
Read = Callable[[Arms], float | None]


@dataclass(frozen=True)
class Transfer:
    """P of the right value in points by arm, its gain over the trunk's end, and that as a share of
    what RL has taught."""

    known: Mapping[str, TrunkInterval]
    gains: Mapping[str, TrunkInterval]
    shares: Mapping[str, Ratio | None]


def transfer(trunks: Sequence[Arms]) -> Transfer | None:
    """Of withheld facts; None where no trunk was asked for them."""

    def vector(name: str) -> Read:
        return lambda arms: known(arms.runs.get(name), WITHHELD)

    return _transfer(
        trunks,
        {
            MIDDLE: lambda a: known(a.trunk, WITHHELD, a.middle),
            RL_MIDDLE: lambda a: known(a.of("rl-withheld", a.middle), WITHHELD),
            END: lambda a: known(a.trunk, WITHHELD, a.end),
            "transplant": vector("vector-rl"),
            "through": lambda a: known(a.of("rl_early-withheld", a.middle), WITHHELD),
            "SFT's vector": vector("vector-sft"),
            "mark-only vector": vector("vector-mark"),
            "partner's vector": vector("vector-partner"),
        },
    )


def contradicted(trunks: Sequence[Arms]) -> Transfer | None:
    """Of facts that text tells wrongly, as those which it is silent on: what is left of each."""

    def through(arms: Arms) -> Run | None:
        return arms.of("rl_early-told-wrongly", arms.middle)

    return _transfer(
        trunks,
        {
            MIDDLE: lambda a: known(a.trunk, TOLD_WRONGLY, a.middle),
            RL_MIDDLE: lambda a: known(through(a), TOLD_WRONGLY, rl_steps(through(a))),
            END: lambda a: known(a.trunk, TOLD_WRONGLY, a.end),
            "through": lambda a: known(through(a), TOLD_WRONGLY),
        },
    )


def _transfer(trunks: Sequence[Arms], arms_: Mapping[str, Read]) -> Transfer | None:
    table = {name: [read(arms) for arms in trunks] for name, read in arms_.items()}
    values = {
        name: [value for value in row if value is not None]
        for name, row in table.items()
        if row and None not in row
    }
    if not values.keys() >= {*BASES}:
        return None
    end, middle = values[END], values[MIDDLE]
    learned = [a - b for a, b in zip(values[RL_MIDDLE], middle, strict=True)]
    gains = {
        name: [a - b for a, b in zip(row, end, strict=True)]
        for name, row in values.items()
        if name not in BASES
    }
    return Transfer(
        {name: interval_of_trunks(row) for name, row in values.items()},
        {name: interval_of_trunks(row) for name, row in gains.items()},
        {name: ratio_of_means(row, learned) for name, row in gains.items()},
    )


@dataclass(frozen=True)
class Check:
    """Whether the manipulation holds: `found` of each trunk, in points."""

    what: str
    least: float
    found: tuple[float, ...]

    @property
    def held(self) -> bool:
        return min(self.found) >= self.least


def checks(trunks: Sequence[Arms]) -> list[Check]:
    """Those that anything is measured for."""
    learned, beside = list[float](), list[float]()
    for arms in trunks:
        before = known(arms.trunk, WITHHELD, arms.middle)
        after = known(arms.of("rl-withheld", arms.middle), WITHHELD)
        if before is not None and after is not None:
            learned.append(after - before)
        if (there := known(arms.trunk, BESIDE, arms.middle)) is not None:
            beside.append(there)
    made = [
        ("RL in the middle teaches withheld facts", LEARNED, learned),
        ("the middle knows what stands beside them", KNOWN_BESIDE, beside),
    ]
    return [Check(what, least, tuple(found)) for what, least, found in made if found]
