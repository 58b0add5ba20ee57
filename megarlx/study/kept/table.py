"""The table of the kept study: each arm's measures over trunks, and what they add up to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megarlx.evaluation.bootstrap import Interval, differences, interval_of_mean
from megarlx.report.measures import (
    Carry,
    Form,
    Ratio,
    Steps,
    answer_specific_carry,
    form_and_skill,
    half_life,
    ratio_of_means,
    steps_to_gain,
)
from megarlx.report.runs import Run
from megarlx.report.student import TrunkInterval, interval_of_trunks
from megarlx.study.kept.arms import (
    AFTER,
    RL_VECTOR,
    Arms,
    Point,
    evaluation,
    last_step,
    late_steps,
    point,
    rl_steps,
)
from megarlx.study.kept.chosen import key

# Of late RL; "": the trunk's end; corpus: more pre-training behind it, of early RL's FLOP.
STARTS = ("", RL_VECTOR, "vector-mark", "vector-partner", "corpus")

# Of a Point, as they are shown.
MEASURES = {"m": "m", "a": "a", "y": "pass@1", "y8": "pass@8", "y32": "pass@32"}
MEASURES |= {"capability": "capability"}

Place = tuple[Run, int]  # a run, and a step of it
Find = Callable[[Arms], Place | None]


@dataclass(frozen=True)
class Row:
    """An arm over those trunks that have it, in their order."""

    label: str
    places: Mapping[int, Place]  # by seed
    points: Mapping[int, Point]
    early_flop: float  # a trunk's, of RL before the end; of all runs that the arm needs
    late_flop: float
    gain: TrunkInterval  # of pass@1 over the trunk's end
    over_questions: Interval | None  # the same, of these trunks
    form: Form | None
    share: Ratio | None  # of late RL's gain

    def mean(self, name: str) -> float | None:
        values = [getattr(reached, name) for reached in self.points.values()]
        known_ = [value for value in values if value is not None]
        return fmean(known_) if len(known_) == len(values) else None


class Table:
    """`rates`: of key(start, k), as the tuning seeds chose; without one, the arm is not shown."""

    def __init__(self, trunks: Sequence[Arms], rates: Mapping[str, str]) -> None:
        self.trunks, self.rates = list(trunks), rates
        self.late_steps = late_steps(self.trunks)

    def late(self, start: str, k: int) -> Find:
        """Late RL at the rate that was chosen for it."""

        def find(arms: Arms) -> Place | None:
            run = arms.rates(start).get(self.rates.get(key(start, k), ""))
            return None if run is None else (run, k)

        return find

    def arms(self) -> Iterator[tuple[str, Find]]:
        yield "trunk's end", lambda arms: (arms.trunk, arms.end)
        yield "RL in the middle", lambda arms: _last(arms.of("rl", arms.middle))
        yield "through early RL", lambda arms: _last(arms.of("rl_early", arms.middle))
        named = ("rl", "rl_early")  # above
        others = {name for arms in self.trunks for name in arms.others_of_the_middle(named)}
        runs = {name for arms in self.trunks for name in arms.runs if _put(name) is None}
        vectors = {name for name in runs if name.startswith("vector-")}
        first = sorted(vectors, key=lambda name: (name != RL_VECTOR, name))
        for name in (*sorted(others), *first):
            yield name, lambda arms, name=name: _last(arms.runs.get(name))  # type: ignore[misc]
        for k in self.late_steps:
            yield f"late mark-only + {k}", lambda arms, k=k: _at(arms.of("rl-mark", arms.end), k)  # type: ignore[misc]
        yield "corpus of equal FLOP", lambda arms: _last(arms.start("corpus"))
        for start in STARTS:
            for k in self.late_steps:
                yield f"{start or 'late-only'} + {k}", self.late(start, k)

    def rows(self) -> list[Row]:
        return [row for label, find in self.arms() if (row := self.row(label, find)) is not None]

    def row(self, label: str, find: Find) -> Row | None:
        places: dict[int, Place] = {}
        points: dict[int, Point] = {}
        for arms in self.trunks:
            place, base = find(arms), point(arms.trunk, arms.end)
            if place is None or base is None or (reached := point(*place)) is None:
                continue
            places[arms.seed], points[arms.seed] = place, reached
        if not points:
            return None
        own = [arms for arms in self.trunks if arms.seed in points]
        bases = [b for arms in own if (b := point(arms.trunk, arms.end)) is not None]
        gains = [points[arms.seed].y - b.y for arms, b in zip(own, bases, strict=True)]
        flop = [arms.flop(*places[arms.seed]) for arms in own]
        return Row(
            label,
            places,
            points,
            fmean(early for early, _ in flop),
            fmean(late for _, late in flop),
            interval_of_trunks(gains),
            interval_of_mean([_by_question(arms, *places[arms.seed]) for arms in own]),
            _apart(bases, [points[arms.seed] for arms in own]),
            self.share_of_late_gain({arms.seed: g for arms, g in zip(own, gains, strict=True)}),
        )

    def difference(self, one: Row, other: Row) -> dict[str, TrunkInterval]:
        """Of each measure, paired by trunk; without those that some trunk does not have."""
        both = sorted(one.points.keys() & other.points.keys())
        found = {}
        for name in MEASURES:
            sides = [[getattr(row.points[seed], name) for seed in both] for row in (one, other)]
            if both and not any(None in side for side in sides):
                found[name] = interval_of_trunks([a - b for a, b in zip(*sides, strict=True)])
        return found

    def share_of_late_gain(self, gains: Mapping[int, float]) -> Ratio | None:
        """Of trunks that have late RL of the most steps, 80, at its best rate."""
        if not self.late_steps:
            return None
        pairs = []
        for arms in self.trunks:
            late, base = self.late("", self.late_steps[-1])(arms), point(arms.trunk, arms.end)
            reached = None if late is None else point(*late)
            if reached is not None and base is not None and arms.seed in gains:
                pairs.append((gains[arms.seed], reached.y - base.y))
        return ratio_of_means([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None

    # Courses over steps, of the means over trunks.

    def over_trunks(self, start: str) -> dict[int, TrunkInterval]:
        """y by late steps, of those steps that every trunk has; 0 is the start itself."""
        found: dict[int, TrunkInterval] = {}
        for k in (0, *self.late_steps):
            find = self.late(start, k) if k else self.start(start)
            places = [find(arms) for arms in self.trunks]
            reached = [None if place is None else point(*place) for place in places]
            ys = [one.y for one in reached if one is not None]
            if ys and len(ys) == len(reached):
                found[k] = interval_of_trunks(ys)
        return found

    def course(self, start: str) -> dict[int, float]:
        return {k: interval.estimate for k, interval in self.over_trunks(start).items()}

    @staticmethod
    def start(start: str) -> Find:
        return lambda arms: _last(arms.start(start)) if start else (arms.trunk, arms.end)

    def steps(self) -> dict[str, tuple[Steps, Steps, Steps | None]]:
        """Of each start: steps to 90% of late's gain, all RL steps, steps saved."""
        late = self.course("")
        if len(late) < 2 or max(late) != self.late_steps[-1]:
            return {}
        found = {}
        alone = steps_to_gain(late[0], late[max(late)], late)
        for start in STARTS:
            course = self.course(start)
            if len(course) < 2:
                continue
            after = steps_to_gain(late[0], late[max(late)], course)
            before = self._early_steps(start)
            every = Steps(after.low + before, after.high + before)
            found[start or "late-only"] = (after, every, alone.less(after) if start else None)
        return found

    def _early_steps(self, start: str) -> int:
        """Of the RL that a vector is made of."""
        vectors = (arms.runs.get(start) for arms in self.trunks)
        sources = [
            arms.named(part.run)
            for arms, run in zip(self.trunks, vectors, strict=True)
            for part in (() if run is None else run.parts)
        ]
        return max((source.steps_done for source in sources if source is not None), default=0)

    def retention(self) -> tuple[dict[int, Ratio], Steps | None]:
        """Of the arm that is trained through, by steps of pre-training after RL; its half-life."""
        found: dict[int, Ratio] = {}
        for after in AFTER:
            pairs = []
            for arms in self.trunks:
                through = arms.of("rl_early", arms.middle)
                early = rl_steps(through) or 0
                here = (point(through, early + after), point(arms.trunk, arms.middle + after))
                begin = (point(through, early), point(arms.trunk, arms.middle))
                if None not in (*here, *begin):
                    pairs.append((_gain(*here), _gain(*begin)))
            ratio = ratio_of_means([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
            if ratio is not None:
                found[after] = ratio
        left = {after: ratio.estimate for after, ratio in found.items()}
        return found, half_life(left) if len(left) == len(AFTER) else None

    def carry(self) -> Carry:
        """Answer-specific; trunks without an α that matches are left out, and counted."""
        found: list[dict[str, tuple[float, float]]] = []
        for name in (RL_VECTOR, "vector-mark-matched"):
            reached = {str(arms.seed): point(arms.runs.get(name)) for arms in self.trunks}
            found.append(
                {s: (p.m, p.y) for s, p in reached.items() if p is not None and p.m is not None}
            )
        return answer_specific_carry(*found)

    def dose(self) -> float | None:
        """FLOP of early RL for each of pre-training."""
        flop = [
            (arms.flop(run)[0], arms.trunk.cost(arms.end).get("flop", 0.0))
            for arms in self.trunks
            if (run := arms.runs.get(RL_VECTOR)) is not None
        ]
        whole = sum(trunk for _, trunk in flop)
        return sum(early for early, _ in flop) / whole if whole else None


def _last(run: Run | None) -> Place | None:
    return None if run is None or not run.evaluations else (run, last_step(run))


def _at(run: Run | None, step: int) -> Place | None:
    return None if run is None else (run, step)


def _by_question(arms: Arms, run: Run, step: int) -> dict[str, float]:
    after, before = evaluation(run, step), evaluation(arms.trunk, arms.end)
    if after is None or before is None or not after.asked_like(before):
        return {}
    return differences(after.percent("pass_at_1"), before.percent("pass_at_1"))


def _apart(bases: Sequence[Point], points: Sequence[Point]) -> Form | None:
    """Means over trunks, in points."""
    parts = []
    for before, after in zip(bases, points, strict=True):
        if before.m is None or after.m is None:
            return None
        sides = [
            (p.m / 100, None if p.a is None else p.a / 100)
            for p in (before, after)
            if p.m is not None
        ]
        parts.append(form_and_skill(sides[0], sides[1]))
    return Form(100 * fmean(p.form for p in parts), 100 * fmean(p.skill for p in parts))


def _gain(after: Point | None, before: Point | None) -> float:
    assert after is not None
    assert before is not None
    return after.y - before.y


def _put(name: str) -> tuple[int, int] | None:
    """The vector's step, and the checkpoint that it is put onto, of a transplant of the matrix."""
    found = re.fullmatch(r"vector-(\d+)-onto-(\d+)", name)
    return None if found is None else (int(found[1]), int(found[2]))


def matrix(arms: Arms) -> dict[tuple[int, int], float]:
    """Share of the late gain by (the vector's step, the checkpoint that it is put onto)."""
    found = {}
    for name, run in arms.runs.items():
        if (places := _put(name)) is None:
            continue
        step, onto = places
        late, base = point(arms.of("rl", onto)), point(arms.trunk, onto)
        reached = point(run)
        if late is not None and base is not None and reached is not None and late.y > base.y:
            found[step, onto] = (reached.y - base.y) / (late.y - base.y)
    return found
