"""From a sweep's configuration to its runs: what each is told, where it lies, what it waits for."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from megarlx.checkpoint import CheckpointError
from megarlx.config import Config, ConfigError, load_config
from megarlx.config.sweep import ExcursionConfig, SweepConfig, TransplantConfig
from megarlx.config.trust import names_in, needs_trust
from megarlx.hf.on_the_fly import run_of_model
from megarlx.hf.sources import is_hugging_face
from megarlx.run.reference import resolve

RUN = re.compile(r"\{run ([^{}]+)\}")


@dataclass(frozen=True)
class Job:
    """One command. It is done when it has said so by its exit code."""

    name: str  # also that of its log
    arguments: tuple[str, ...]  # of `megarlx`
    out: Path | None  # the run it makes; None: it adds to another one
    steps: int | None
    needs: tuple[str, ...] = ()  # the jobs that must be done before
    run: Path = Path()  # whose files hold what it makes
    seed: int = 0


def jobs_of(sweep: SweepConfig) -> list[Job]:
    """In an order in which every job comes after what it needs."""
    of_seed = _from_run if sweep.trunk_is_there else _of_seed
    jobs = [job for seed in sweep.seeds for job in of_seed(sweep, seed)]
    counts = Counter(job.name for job in jobs)
    if double := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(
            [f"two runs of the sweep are called {double[0]}; give an [[excursions]] table a name"]
        )
    return list(_in_order(jobs))


def _in_order(jobs: Sequence[Job]) -> Iterator[Job]:
    """As they stand, but behind what they need."""
    names, done = {job.name for job in jobs}, set[str]()
    for job in jobs:
        for name in (name for name in job.needs if name not in names):
            known = ", ".join(one.name for one in jobs if one.seed == job.seed and one.out)
            raise ConfigError([f"{job.name} needs {name}, which is no run of the sweep: {known}"])
    left = list(jobs)
    while left:
        ready = [job for job in left if done.issuperset(job.needs)]
        if not ready:
            raise ConfigError([f"runs of the sweep need each other: {left[0].name} and others"])
        yield from ready
        done.update(job.name for job in ready)
        left = [job for job in left if job.name not in done]


@dataclass(frozen=True)
class _Trunk:
    """What the runs of one seed start from."""

    sweep: SweepConfig
    path: Path
    seed: int
    trust: tuple[str, ...]
    values: Mapping[str, Any]  # of the axes
    job: str | None  # None: it is there

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.job is None else (self.job,)

    @property
    def suites(self) -> tuple[str, ...]:
        return () if self.sweep.suites is None else ("--config", self.sweep.suites)

    def named(self, stem: str, values: Mapping[str, Any] | None = None) -> Path:
        return Path(self.sweep.out) / _named(stem, {**self.values, **(values or {})}, self.seed)


def _of_seed(sweep: SweepConfig, seed: int) -> Iterator[Job]:
    for values in _combinations(sweep.axes):
        settings = {**sweep.set, **dict.fromkeys(sweep.seed_keys, seed), **values}
        path = Path(sweep.trunks or sweep.out) / _named("trunk", values, seed)
        config = load_config(sweep.trunk, _settings(settings))
        # The trunk is the user's own, as the sweep is.
        trust = _trust({name for _, kind, name in names_in(config) if needs_trust(kind, name)})
        trunk = _Trunk(sweep, path, seed, trust, values, path.name)
        yield _training(trunk, path, settings)
        for partner in sweep.partners:
            given = _with_added(config, {**settings, **partner.set}, partner.add)
            yield _training(trunk, trunk.named(partner.name), given)
        yield from _made_of(trunk)


def _from_run(sweep: SweepConfig, seed: int) -> Iterator[Job]:
    """Excursions from a trunk that is there: the seed is theirs, and it is measured once."""
    seeded = dict.fromkeys(sweep.seed_keys, seed)
    own = [one.model_copy(update={"set": {**seeded, **one.set}}) for one in sweep.excursions]
    evaluate = sweep.evaluate if seed == sweep.seeds[0] else ()
    changed = sweep.model_copy(update={"excursions": tuple(own), "evaluate": evaluate})
    path = Path(sweep.trunk)
    if is_hugging_face(path):
        path = run_of_model(path, Path(sweep.out))
    trunk = _Trunk(changed, path, seed, _trust(sweep.trust), {}, None)
    yield from _made_of(trunk)


def _training(trunk: _Trunk, path: Path, settings: Mapping[str, Any]) -> Job:
    file = trunk.sweep.trunk
    words = ("train", file, "--out", str(path), *_overrides(settings))
    return Job(
        path.name, words, path, load_config(file, _settings(settings)).steps, (), path, trunk.seed
    )


def _with_added(
    config: Config, settings: Mapping[str, Any], add: Mapping[str, int]
) -> dict[str, Any]:
    found = dict(settings)
    for key, more in add.items():
        value = found.get(key, reduce(getattr, key.split("."), config))
        if not isinstance(value, int):
            raise ConfigError(
                [f"partners add {more} to {key}, which is {value!r}: no whole number"]
            )
        found[key] = value + more
    return found


def _made_of(trunk: _Trunk) -> Iterator[Job]:
    sweep = trunk.sweep
    for where in sweep.evaluate:
        name = f"{trunk.path.name}-evaluate-{_plain(where)}"
        words = ("evaluate", f"{trunk.path}@{where}", *trunk.suites, *trunk.trust)
        yield Job(name, words, None, None, trunk.needs, trunk.path, trunk.seed)
    for excursions in sweep.excursions:
        yield from _excursions(trunk, excursions)
    for transplant in sweep.transplants:
        yield from _transplants(trunk, transplant)


def check_files(sweep: SweepConfig) -> None:
    """Before a trunk is trained for hours: the recipes and the suites are there."""
    named = [
        (f"excursions[{at}].recipes", path)
        for at, one in enumerate(sweep.excursions)
        for path in one.recipes
    ]
    if sweep.suites is not None:
        named.append(("suites", sweep.suites))
    missing = [
        f"{key}: there is no file '{path}'" for key, path in named if not Path(path).is_file()
    ]
    if missing:
        raise ConfigError(missing)


def check_checkpoints(sweep: SweepConfig) -> None:
    """Before anything is run, or listed: what starts from a trunk that is there finds it."""
    if not sweep.trunk_is_there:
        return
    wanted = [*sweep.evaluate, *(at for one in sweep.excursions for at in one.checkpoints)]
    problems = []
    for where in dict.fromkeys(wanted):
        try:
            if where != "all":
                resolve(f"{sweep.trunk}@{where}", Path(sweep.out))
        except (ValueError, CheckpointError) as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)


def _trust(names: Collection[str]) -> tuple[str, ...]:
    return tuple(word for name in sorted(names) for word in ("--trust", name))


def _excursions(trunk: _Trunk, config: ExcursionConfig) -> Iterator[Job]:
    for start, recipe, where, values in itertools.product(
        config.runs or (None,), config.recipes, config.checkpoints, _combinations(config.axes)
    ):
        parent, needs = trunk.path, trunk.needs
        named = f"-{_plain(config.name)}" if config.name else ""
        stem = f"{Path(recipe).stem}{named}"
        if start is not None:
            parent = trunk.named(start)
            stem, needs = f"{stem}-from-{start}", (parent.name,)
        if start is None or where != "latest":
            stem += f"-at-{_plain(where)}"
        run = trunk.named(stem, values)
        given, named_runs = _with_runs(trunk, {**config.set, **values})
        needs = tuple(dict.fromkeys((*needs, *named_runs)))
        overrides = _overrides(given)
        words = (
            *("branch", f"{parent}@{where}", recipe, "--out", str(run)),
            *overrides,
            *trunk.trust,
        )
        yield Job(run.name, words, run, None, needs, run, trunk.seed)


def _with_runs(trunk: _Trunk, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`{run NAME}` in a text is the folder of that run of the sweep; and those runs."""
    needs: list[str] = []

    def folder(match: re.Match[str]) -> str:
        needs.append(trunk.named(match[1]).name)
        return str(trunk.named(match[1]))

    def put(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: put(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [put(one) for one in value]
        return RUN.sub(folder, value) if isinstance(value, str) else value

    return {key: put(value) for key, value in settings.items()}, needs


def _transplants(trunk: _Trunk, config: TransplantConfig) -> Iterator[Job]:
    for alpha in config.each_alpha or (None,):
        taken = [trunk.named(name) for name in config.excursions]
        run = trunk.named(config.name if alpha is None else f"{config.name}-alpha-{alpha:g}")
        needs = [*trunk.needs, *(path.name for path in taken)]
        words = ["transplant", *map(str, taken), "--onto", f"{trunk.path}@{config.onto}"]
        words += ["--out", str(run)]
        for start in config.starts:
            name, _, where = start.partition("@")
            words += ["--from", f"{trunk.named(name)}@{where or 'latest'}"]
            needs.append(trunk.named(name).name)
        if config.match is not None:
            words += ["--match", str(trunk.named(config.match)), *trunk.suites]
            needs.append(trunk.named(config.match).name)
        else:
            given = config.alpha if alpha is None else (alpha,)
            words += ["--alpha", ",".join(f"{value:g}" for value in given)]
        for option in ("suite", "change"):
            if (value := getattr(config, option)) is not None:
                words += [f"--{option}", value]
        words += trunk.trust
        yield Job(run.name, tuple(words), run, None, tuple(dict.fromkeys(needs)), run, trunk.seed)
        measure = ("evaluate", str(run), *trunk.suites, *trunk.trust)
        yield Job(f"{run.name}-evaluate", measure, None, None, (run.name,), run, trunk.seed)


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_toml(value)}" for key, value in values.items()]


def _combinations(axes: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _named(stem: str, values: Mapping[str, Any], seed: int) -> str:
    parts = [f"{key.rpartition('.')[2]}-{_plain(value)}" for key, value in values.items()]
    return "-".join([stem, *parts, f"seed-{seed}"])


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.]+", "-", text).strip("-") or "none"


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [word for setting in _settings(settings) for word in ("--set", setting)]


def _toml(value: Any) -> str:
    """A value as TOML; what JSON and TOML write alike, and tables."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return json.dumps(value)
