"""Training, excursions and opened checkpoints for programs in Python: `megarlx.train` and so on.

A program may be started by hand or by torchrun, Slurm or MPI; all processes call these together.
What is wrong is raised, where the commands print it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megarlx.comm import launch
from megarlx.config import load_config
from megarlx.run.begin import start, start_excursion
from megarlx.run.branch import excursion_config
from megarlx.run.directory import Weights
from megarlx.run.merge import merged
from megarlx.run.opened import OpenedRun, open_run
from megarlx.run.opening import open_config
from megarlx.run.reference import resolve
from megarlx.run.session import launched
from megarlx.run.stopped import done
from megarlx.run.sums import write_sum
from megarlx.run.transplant import Asked, make


def train(
    config: str | Path, out: str | Path, overrides: Sequence[str] = (), *, fresh: bool = False
) -> bool:
    """Trains a run, or goes on with it where `out` holds checkpoints.

    Returns whether it is done: False where a signal or logging.stop_after_minutes ended it, after
    it was saved. After Ctrl-C it is saved too, and KeyboardInterrupt is raised.

    overrides   as behind --set: "training.steps=100"
    fresh       refuse a folder that already holds checkpoints
    """
    read = load_config(config, overrides)
    with launched(read) as (started, device):
        return done(start(read, Path(config), Path(out), started, device, fresh=fresh))


def branch(
    run: str,
    recipe: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    trusted: Collection[str] = (),
    fresh: bool = False,
    weights: Weights = "last",
) -> bool:
    """An excursion from RUN@ITERATION by a recipe; returns and raises what `train` does.

    trusted   names of code in the run's configuration that may be used, as behind --trust
    weights   those of the checkpoint's step, or their moving average where it keeps one
    """
    reference, path = resolve(run, Path(out).parent), Path(recipe)
    config = excursion_config(reference.run, path, overrides, trusted)
    with launched(config) as (started, device):
        whole = reference, config, path, Path(out)
        return done(start_excursion(*whole, started, device, fresh=fresh, weights=weights))


def transplant(
    excursions: Sequence[str],
    onto: str,
    out: str | Path,
    *,
    alpha: float | Sequence[float] = 1.0,
    starts: Sequence[str] = (),
    trusted: Collection[str] = (),
) -> bool:
    """A run of the weights θ_onto + Σ alpha (θ_excursion − θ_start); False where it is there.

    alpha    one for all, or one each
    starts   checkpoints, one for all or one each; none: those that the excursions branched from
    """
    given = [alpha] if isinstance(alpha, int | float) else list(alpha)
    asked = Asked(excursions, onto, Path(out), given, starts, trusted=trusted)
    return make(asked)


def merge(
    runs: Sequence[str],
    out: str | Path,
    *,
    shares: Sequence[float] = (),
    trusted: Collection[str] = (),
) -> bool:
    """A run of the mean of checkpoints' weights; False where it is there already.

    shares   of each; none: equal
    """
    made = merged(runs, shares)
    made.check(trusted)
    return write_sum(made, Path(out))


def open(
    run: str,
    overrides: Sequence[str] = (),
    *,
    trusted: Collection[str] = (),
    device: str = "auto",
    weights: Weights = "last",
) -> OpenedRun:
    """The model and the tokenizer of RUN@ITERATION, or of a Hugging Face folder, which becomes a
    run in runs/converted/. A run is only read.

        with megarlx.open("runs/trunk@latest") as run:
            answers = run.generate(["…"], samples=4, temperature=0.7)
            results = run.evaluate("suites.toml")

    Without `with` it stays open until `run.close()`, or until the program ends.

    trusted   names of code in the run's configuration that may be used, as behind --trust
    weights   those of the checkpoint's step, or their moving average where it keeps one
    """
    reference, processes = resolve(run), launch.read().world_size
    config = open_config(reference.run, processes, overrides, trusted=trusted, device=device)
    with ExitStack() as stack:
        started, place = stack.enter_context(launched(config))
        opened = open_run(reference, config, started, place, trusted, weights)
        return replace(opened, closing=stack.pop_all())
