"""A transplant: θ_M + Σ αᵢ(θᵢ − θ_from,ᵢ), what excursions made of their start, put elsewhere.

α is given, or chosen by a validation suite: the one of a list with the highest pass@1, or the one
that brings the share of marked answers to that of another run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megarlx.checkpoint import read_manifest
from megarlx.comm import launch
from megarlx.comm.collectives import barrier
from megarlx.comm.share import Share
from megarlx.config.evaluation import EvaluationConfig, SuiteConfig
from megarlx.run.branch import parent_of, read_config
from megarlx.run.directory import RunDirectory, RunError
from megarlx.run.opened import OpenedRun, open_run
from megarlx.run.opening import masters_of, open_config, put_weights
from megarlx.run.reference import RunReference, resolve
from megarlx.run.session import launched
from megarlx.run.suites import chosen as chosen_suites
from megarlx.run.suites import made_suites, measured, suites_of
from megarlx.run.sums import Term, WeightSum, add, write_shared, write_sum
from megarlx.run.vectors import parsed

RECIPE = "transplant"
MOST_ALPHA, EVALUATIONS, WITHIN = 2.0, 8, 0.02  # of a match: where, how often, how near
Measure = Callable[[float], float]


class NotReachedError(RunError):
    """No α was found that matches."""


@dataclass(frozen=True)
class Asked:
    """A transplant as it is asked for; `transplant` says what each means."""

    excursions: Sequence[str]
    onto: str
    out: Path
    alpha: Sequence[float] = ()
    starts: Sequence[str] = ()
    alphas: Sequence[float] = ()
    match: str | None = None
    suite: str | None = None
    file: str | None = None  # of suites, where it is not the run's own that are measured
    change: str | None = None
    layout: str | None = None
    overrides: Sequence[str] = ()
    trusted: Collection[str] = ()

    def __post_init__(self) -> None:
        ways = [f"--{way}" for way in ("alpha", "alphas", "match") if getattr(self, way)]
        if len(ways) > 1:
            raise RunError(f"{' and '.join(ways)} cannot be given together: each says what α is")
        for option, value in (("suite", self.suite), ("config", self.file)):
            if value is not None and not (self.alphas or self.match):
                raise RunError(f"--{option} is for --alphas and --match, which measure")
        if self.change is not None:
            parsed(self.change)
            if ways != ["--alpha"] and ways:
                raise RunError(f"--change is a control: its --alpha is given, not by {ways[0]}")
        for way in ("alpha", "alphas"):
            for value in getattr(self, way):
                if not math.isfinite(value):
                    raise RunError(f"--{way} is {value}; allowed are finite numbers")
        for name, values in (("alpha", self.alpha), ("from", self.starts)):
            if len(values) not in (0, 1, len(self.excursions)):
                raise RunError(
                    f"--{name} has {len(values)} values for {len(self.excursions)} excursions; "
                    "allowed are one for all, or one each"
                )

    @property
    def weights(self) -> list[float]:
        given = self.alpha or (1.0,)
        return list(given) * (len(self.excursions) if len(given) == 1 else 1)

    @property
    def sum(self) -> WeightSum:
        onto = resolve(self.onto)
        taken = [resolve(text) for text in self.excursions]
        given: list[RunReference | None] = [resolve(text) for text in self.starts] or [None]
        starts = given * (len(taken) if len(given) == 1 else 1)
        terms = tuple(
            Term(weight, one, start or start_of(one), self.change)
            for weight, one, start in zip(self.weights, taken, starts, strict=True)
        )
        return WeightSum(RECIPE, onto, onto, terms)


def start_of(excursion: RunReference) -> RunReference:
    """The checkpoint that a run branched from, as it was then."""
    parent = RunDirectory(excursion.run).parent
    if parent is None:
        raise RunError(
            f"{excursion.run} knows no parent in its lineage.json, to which its weights could be "
            "compared; --from RUN@K names a checkpoint"
        )
    found = read_manifest(parent.checkpoint).digest
    if found != parent.digest:
        raise RunError(
            f"{excursion.run} started from {parent.checkpoint} when its digest was "
            f"{parent.digest[:12]}; now it is {found[:12]}: --from RUN@K names a checkpoint"
        )
    return RunReference(Path(parent.run), parent.iteration, parent.checkpoint)


def make(asked: Asked, say: Callable[[str], None] = lambda _: None) -> bool:
    """Writes the run; False where it is there already. Called by all processes of a launch."""
    made = asked.sum
    made.check(asked.trusted)
    if not (asked.alphas or asked.match):
        return write_sum(made, asked.out, asked.layout)
    wanted = chooser_of(asked)  # refused before a model is built
    run, processes = made.beside.run, launch.read().world_size
    config = open_config(
        run, processes, asked.overrides, uses=("evaluation",), trusted=asked.trusted
    )
    with launched(config) as (started, device):
        opened = open_run(made.beside, config, started, device, asked.trusted)
        alpha, told = wanted(made, opened, say if started.rank == 0 else lambda _: None)
        world = opened.model.mesh.world
        share = Share(started.rank, started.world_size, lambda: barrier(world))
        made = made.scaled([alpha] * len(made.terms))
        return write_shared(made, asked.out, share, asked.layout, told)


Chooser = Callable[[WeightSum, OpenedRun, Callable[[str], None]], tuple[float, dict[str, Any]]]


def chooser_of(asked: Asked) -> Chooser:
    evaluation, _ = suites_of(read_config(resolve(asked.onto).run), asked.file)
    suite = choosing_suite(evaluation.suites, asked.suite)
    if asked.match is None:
        if 1 not in suite.ks:
            raise RunError(f"--alphas compares pass@1; ks of suite '{suite.name}' have no 1")
        alphas = list(dict.fromkeys(asked.alphas))

        def highest(
            made: WeightSum, opened: OpenedRun, say: Callable[[str], None]
        ) -> tuple[float, dict[str, Any]]:
            trial = Trial(made, opened, suite, "pass_at_1", say, asked.file)
            best = highest_of(alphas, trial)
            return best, {"by": "alphas", "suite": suite.name, "tried": trial.tried}

        return highest
    if suite.form is None:
        raise RunError(
            f"--match compares shares of marked answers; suite '{suite.name}' has no form, such as "
            'form = "answer_format"'
        )
    reference = resolve(asked.match)

    def matching(
        made: WeightSum, opened: OpenedRun, say: Callable[[str], None]
    ) -> tuple[float, dict[str, Any]]:
        replace(made, terms=(*made.terms, Term(0.0, reference))).check(asked.trusted)
        trial = Trial(made, opened, suite, "marked", say, asked.file)
        target = trial.of(reference)
        say(f"{asked.match}: marked {target:.4f}")
        alpha = bisected(trial, target)
        told = {"by": "match", "suite": suite.name, "marked": target, "of": asked.match}
        return alpha, {**told, "tried": trial.tried}

    return matching


def choosing_suite(suites: Sequence[SuiteConfig], name: str | None) -> SuiteConfig:
    """What α is chosen by: never the test that is reported."""
    there = [s for s in suites if s.kind == "pass_at_k" and s.split == "validation"]
    allowed = ", ".join(s.name for s in there) or "none"
    if name is None and len(there) == 1:
        return there[0]
    if name is None:
        raise RunError(
            f"{len(there)} pass_at_k suites have split = 'validation' ({allowed}); --suite names "
            "the one to choose by"
        )
    found = next((s for s in suites if s.name == name), None)
    if found is None or found not in there:
        is_a = "none" if found is None else f"of kind {found.kind} with split = '{found.split}'"
        raise RunError(
            f"--suite {name}: it is {is_a}; α is chosen by a pass_at_k suite with split = "
            f"'validation': allowed are {allowed}"
        )
    return found


@dataclass
class Trial:
    """A metric of the suite at any α, without writing anything."""

    made: WeightSum
    opened: OpenedRun
    suite: SuiteConfig
    metric: str
    say: Callable[[str], None]
    file: str | None = None
    tried: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.made.base is not None
        model = self.opened.model
        names = [self.suite.name]
        self._asked: tuple[EvaluationConfig, Any] = chosen_suites(
            self.opened.config, str(self.opened.reference.run), file=self.file, names=names
        )
        self._made = made_suites(self.opened, self._asked[0])
        self._masters: dict[RunReference, Tensor] = {
            one: masters_of(model, one.checkpoint) for one in self.made.references
        }

    def __call__(self, alpha: float) -> float:
        assert self.made.base is not None
        held = self._masters

        def vector(term: Term) -> Tensor:
            plus = held[term.plus].double()
            return plus if term.minus is None else plus - held[term.minus].double()

        terms = ((alpha, partial(vector, term)) for term in self.made.terms)
        value = self._measure(add(held[self.made.base], terms), self.made.tokens())
        self.tried.append({"alpha": alpha, self.metric: value})
        self.say(f"alpha {alpha:g}: {self.metric} {value:.4f}")
        return value

    def of(self, reference: RunReference) -> float:
        """The same of a run as it is."""
        masters = masters_of(self.opened.model, reference.checkpoint)
        return self._measure(masters, parent_of(reference).tokens)

    def _measure(self, masters: Tensor, tokens: dict[str, int]) -> float:
        opened, (evaluation, template) = self.opened, self._asked
        put_weights(opened.model, masters)
        state = {**opened.loaded.state, "run": {"tokens": tokens}}
        subject = replace(opened, loaded=replace(opened.loaded, state=state))
        (result,) = measured(subject, evaluation, template, self._made, keep=False)
        return float(result["metrics"][self.metric])


def highest_of(alphas: Sequence[float], measure: Measure) -> float:
    """Ties go to the smaller."""
    found = {alpha: measure(alpha) for alpha in alphas}
    return min(found, key=lambda alpha: (-found[alpha], alpha))


def bisected(measure: Measure, target: float) -> float:
    """The first α on the way whose value is near enough; the value is taken to rise with α."""
    low, high = 0.0, MOST_ALPHA
    tried: dict[float, float] = {}
    for _ in range(EVALUATIONS):
        alpha = (low + high) / 2
        value = tried[alpha] = measure(alpha)
        if abs(value - target) <= WITHIN:
            return alpha
        low, high = (alpha, high) if value < target else (low, alpha)
    nearest = min(tried, key=lambda alpha: (abs(tried[alpha] - target), alpha))
    raise NotReachedError(
        f"--match: no α in [0, {MOST_ALPHA:g}] was found in {EVALUATIONS} evaluations whose share "
        f"of marked answers is within {WITHIN:g} of {target:.4f}; the nearest is α = {nearest:g} "
        f"with {tried[nearest]:.4f}"
    )
