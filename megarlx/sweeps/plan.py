"""From a sweep's configuration to its runs: what each is told, where it lies, what it waits for."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlx.checkpoint import CheckpointError
from megarlx.config import ConfigError, load_config
from megarlx.config.sweep import ExcursionConfig, SweepConfig
from megarlx.config.trust import names_in, needs_trust
from megarlx.hf.on_the_fly import run_of_model
from megarlx.hf.sources import is_hugging_face
from megarlx.run.reference import resolve


@dataclass(frozen=True)
class Job:
    """One command. It is done when it has said so by its exit code."""

    name: str  # also that of its log
    arguments: tuple[str, ...]  # of `megarlx`
    out: Path | None  # the run it makes; None: it adds to another one
    steps: int | None
    needs: str | None = None  # the job that must be done before
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
    return jobs


def _of_seed(sweep: SweepConfig, seed: int) -> Iterator[Job]:
    out = Path(sweep.out)
    for values in _combinations(sweep.axes):
        settings = {**sweep.set, **dict.fromkeys(sweep.seed_keys, seed), **values}
        trunk = Path(sweep.trunks or out) / _named("trunk", values, seed)
        overrides = _overrides(settings)
        config = load_config(sweep.trunk, [f"{k}={_toml(v)}" for k, v in settings.items()])
        words = ("train", sweep.trunk, "--out", str(trunk), *overrides)
        yield Job(trunk.name, words, trunk, config.steps, None, trunk, seed)
        # The trunk is the user's own, as the sweep is.
        trust = _trust({name for _, kind, name in names_in(config) if needs_trust(kind, name)})
        yield from _evaluations(sweep, trunk, seed, trust, trunk.name)
        for excursions in sweep.excursions:
            yield from _excursions(excursions, out, trunk, values, seed, trust, trunk.name)


def _from_run(sweep: SweepConfig, seed: int) -> Iterator[Job]:
    """Excursions from a trunk that is there: the seed is theirs, and it is measured once."""
    trunk, trust = Path(sweep.trunk), _trust(sweep.trust)
    if is_hugging_face(trunk):
        trunk = run_of_model(trunk, Path(sweep.out))
    if seed == sweep.seeds[0]:
        yield from _evaluations(sweep, trunk, seed, trust, None)
    for excursions in sweep.excursions:
        seeded = {**dict.fromkeys(sweep.seed_keys, seed), **excursions.set}
        own = excursions.model_copy(update={"set": seeded})
        yield from _excursions(own, Path(sweep.out), trunk, {}, seed, trust, None)


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


def _evaluations(
    sweep: SweepConfig, trunk: Path, seed: int, trust: tuple[str, ...], needs: str | None
) -> Iterator[Job]:
    suites = () if sweep.suites is None else ("--config", sweep.suites)
    for where in sweep.evaluate:
        name = f"{trunk.name}-evaluate-{_plain(where)}"
        words = ("evaluate", f"{trunk}@{where}", *suites, *trust)
        yield Job(name, words, None, None, needs, trunk, seed)


def _excursions(
    config: ExcursionConfig,
    out: Path,
    trunk: Path,
    trunk_values: Mapping[str, Any],
    seed: int,
    trust: tuple[str, ...],
    needs: str | None,
) -> Iterator[Job]:
    for recipe, where, values in itertools.product(
        config.recipes, config.checkpoints, _combinations(config.axes)
    ):
        named = f"-{_plain(config.name)}" if config.name else ""
        stem = f"{Path(recipe).stem}{named}-at-{_plain(where)}"
        run = out / _named(stem, {**trunk_values, **values}, seed)
        overrides = _overrides({**config.set, **values})
        yield Job(
            run.name,
            ("branch", f"{trunk}@{where}", recipe, "--out", str(run), *overrides, *trust),
            run,
            None,
            needs,
            run,
            seed,
        )


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
    return [word for key, value in settings.items() for word in ("--set", f"{key}={_toml(value)}")]


def _toml(value: Any) -> str:
    """A value as TOML; what JSON and TOML write alike, and tables."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return json.dumps(value)
