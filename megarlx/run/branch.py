"""An excursion: a run that starts from a checkpoint of another one and follows a recipe.

The parent is only read. What an excursion takes over is its weights, and of the objectives that
its stages go on with (`inherit`) the moments, the data position and the learning-rate course.
Everything else begins anew.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megarlx.checkpoint import (
    CheckpointError,
    check_run_state,
    checkpoint_name,
    iterations,
    read_manifest,
    reading_state,
    refer,
)
from megarlx.comm import launch
from megarlx.config import Config, load_config
from megarlx.config.load import over
from megarlx.config.objectives import PRETRAINING
from megarlx.config.optimizer import merged
from megarlx.config.trust import check_trust, names_in, used
from megarlx.run.assemble import assemble
from megarlx.run.directory import Parent, RunDirectory, RunError, Weights, versions
from megarlx.run.reference import RunReference, tokens_of

# Sections of the parent's configuration that a recipe need not repeat.
INHERITED = (*("model", "data", "template", "templates", "evaluation", "sft", "rl", "objectives"),)
OF_TRAINING = (
    *("sequences_per_step", "sequences_per_microbatch", "sequence_length"),
    *("z_loss", "seed", "precision", "recompute", "kept_gradients_mib", "layers", "fp8", "device"),
)


def read_config(run: Path) -> Config:
    path = run / "resolved.json"
    if not path.exists():
        raise RunError(f"{run} holds no resolved.json: what its model looks like is not known")
    return load_config(path, trusted=())


def excursion_config(
    parent: Path, recipe: Path, overrides: Sequence[str] = (), trusted: Collection[str] = ()
) -> Config:
    """The recipe, over what it takes from its parent: of code, only what is trusted."""
    own = set(trusted)
    config = recipe_config(read_config(parent), recipe, overrides, str(parent), own)
    check_trust(names_in(used(config)), str(parent), own)
    return config


def recipe_config(
    before: Config,
    recipe: Path,
    overrides: Sequence[str],
    parent: str,
    own: set[str] | None = None,
) -> Config:
    """The recipe over the configuration that a run of it would start from.

    `own` is what of the parent's is trusted, and gets every text that the recipe and the overrides
    hold; None: the parent is the user's own.
    """
    whole = before.model_dump(mode="json")
    base = {key: whole[key] for key in INHERITED}
    base["training"] = {key: whole["training"][key] for key in OF_TRAINING}

    def prepare(given: dict[str, Any]) -> dict[str, Any]:
        if own is not None:
            own.update(_texts(given))
        return _completed(given, base, before)

    config = load_config(recipe, overrides, prepare=prepare, trusted=own)
    if config.model != before.model:
        raise RunError(f"{recipe}: [model] is another one than that of {parent}; leave it out")
    if not config.stages:
        raise RunError(f"{recipe}: has no [[stages]]; a recipe is made of them")
    return config


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _completed(given: dict[str, Any], base: dict[str, Any], before: Config) -> dict[str, Any]:
    """Objectives that go on have the optimizer and the course they had, where nothing is said. A
    template in frames is not put together with a model's own."""
    template = given.get("template")
    chats = [one for one in (template, base["template"]) if isinstance(one, dict)]
    if isinstance(template, dict) and any(one.get("chat") is not None for one in chats):
        base = base | {"template": None}
    stages = given.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        objectives = stage.get("objectives") if isinstance(stage, dict) else None
        if not isinstance(objectives, dict):
            continue
        for name, one in objectives.items():
            if isinstance(one, dict) and one.get("inherit") is True:
                objectives[name] = merged(course_of(before, name) or {}, one)
    return over(base, given)


def course_of(config: Config, name: str) -> dict[str, Any] | None:
    """The optimizer settings with which a run last trained an objective."""
    index = config.timeline.last_stage_of(name)
    if index is None:
        return None
    stage = config.all_stages[index]
    one = stage.objectives[name]
    settings = one.model_dump(mode="json", exclude={"weight", "turns", "inherit"})
    return settings | {"schedule_steps": one.schedule_steps or stage.times.steps_of(name)}


def parent_of(
    reference: RunReference, replayed: Path | None = None, weights: Weights = "last"
) -> Parent:
    manifest = read_manifest(replayed or reference.checkpoint)
    tokens = tokens_of(manifest.state)
    return Parent(
        run=str(reference.run.resolve()),
        iteration=manifest.iteration,
        digest=manifest.digest,
        trunk_tokens=tokens.get(PRETRAINING, 0),
        tokens=tokens,
        replayed=None if replayed is None else str(replayed.resolve()),
        weights=weights,
    )


def write_lineage(out: RunDirectory, parent: Parent, recipe: Path, config: Config) -> None:
    """Before the excursion's first step; a folder that has one already must be the same."""
    known = out.parent
    if known is not None:
        if not known.is_same(parent):
            raise RunError(
                f"{out.path} is an excursion from {known.run} at iteration {known.iteration} "
                f"({known.digest[:12]}, weights {known.weights}), not from {parent.run} at "
                f"{parent.iteration} ({parent.digest[:12]}, weights {parent.weights}); choose "
                "another --out"
            )
        if known != parent:  # which lies elsewhere by now
            out.write_json("lineage.json", {**out.lineage, "parent": asdict(parent)})
        return
    if (out.path / "lineage.json").exists():
        raise RunError(f"{out.path} holds a run that is no excursion; choose another --out")
    first = config.all_stages[0].objectives
    everything = {name for stage in config.all_stages for name in stage.objectives}
    restored = sorted(
        name
        for name in everything
        if any(name in s.objectives and s.objectives[name].inherit for s in config.all_stages)
    )
    lineage = {
        "parent": asdict(parent),
        "recipe": recipe.stem,
        "seed": config.training.seed,
        "trunk_tokens": parent.trunk_tokens,
        "composition": composition_of(parent),
        "restored": ["weights", *(f"{name}: moments, data, course" for name in restored)],
        "reset": [f"{name}: moments, data, course" for name in sorted(set(first) - set(restored))],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }
    out.write_json("lineage.json", lineage)


def composition_of(parent: Parent) -> dict[str, int]:
    """Tokens of each source that the parent had read."""
    from megarlx.training.metrics import read_metrics

    found: dict[str, int] = {}
    for line in read_metrics(Path(parent.run) / "metrics.jsonl"):
        if line["step"] > parent.iteration:
            break
        for key, value in line.items():
            if key.startswith("data/") and key.endswith("_tokens"):
                found[key.removeprefix("data/").removesuffix("_tokens")] = int(value)
    return found


def keep_parent(parent: Parent, out: Path, folder: Path | None = None) -> bool:
    """Tells the parent's clean-up that this checkpoint is needed; says so where it cannot.

    folder   that holds it; None: the parent's own
    """
    folder = folder or Path(parent.run) / "checkpoints"
    try:
        refer(folder, parent.iteration, str(out.resolve()))
    except (OSError, CheckpointError) as error:
        print(
            f"warning: {folder} cannot be told that {out} needs iteration {parent.iteration} "
            f"({error}); its retention may delete it",
            file=sys.stderr,
        )
        return False
    return True


def earlier(reference: str) -> tuple[Path, int, int]:
    """(run, the wanted iteration, the nearest saved one before it) of a RUN@ITERATION."""
    run_text, _, which = reference.rpartition("@")
    run = Path(run_text)
    if not which.isdecimal():
        raise RunError(f"{reference}: --replay needs RUN@ITERATION, a number of steps")
    wanted, there = int(which), iterations(run / "checkpoints")
    before = [i for i in there if i <= wanted]
    if not before:
        raise RunError(f"{reference}: no checkpoint at or before {wanted}; {run} holds {there}")
    last = read_config(run).steps
    if wanted > last:
        raise RunError(f"{reference}: the run ends at step {last}")
    return run, wanted, before[-1]


def replay_cost(run: Path, wanted: int, nearest: int) -> str:
    """What reaching an iteration that was not saved would take."""
    from megarlx.training.metrics import read_metrics

    seconds = [
        line["perf/step_seconds"]
        for line in read_metrics(run / "metrics.jsonl")
        if "perf/step_seconds" in line
    ]
    time_text = ""
    if seconds:
        median = sorted(seconds)[len(seconds) // 2]
        time_text = f", about {median * (wanted - nearest):,.0f} s as the run was trained"
    return f"--replay would take {wanted - nearest} steps from iteration {nearest}{time_text}"


def replay_config(before: Config, layout: Mapping[str, Any]) -> Config:
    """The parent's own configuration, saving nothing on the way."""
    whole = before.model_dump(mode="json")
    return Config.model_validate(
        whole
        | {"layout": dict(layout), "evaluation": {}}
        | {"checkpoints": {"average_decay": before.checkpoints.average_decay}}
    )


def replay(
    text: str,
    out: RunDirectory,
    excursion: Config,
    started: launch.Launch,
    device: torch.device,
    trusted: Collection[str] = (),
) -> Path:
    """The checkpoint of an iteration that the parent did not save, trained once more.

    On a CPU, in the layout that the parent was trained in, it is the same bits.
    """
    run, wanted, nearest = earlier(text)
    directory = RunDirectory(out.path / "replay")
    there = directory.checkpoints / checkpoint_name(wanted)
    if (there / "manifest.json").exists():
        return there
    before = read_config(run)
    check_trust(names_in(used(before), {*Config.model_fields} - {"evaluation"}), str(run), trusted)
    config = replay_config(before, excursion.layout.model_dump(mode="json"))
    made = assemble(config, directory.path, started, device, tokenizer_from=run)
    try:
        checkpoint = run / "checkpoints" / checkpoint_name(nearest)
        check_run_state(checkpoint, read_manifest(checkpoint))
        with reading_state(checkpoint):
            made.trainer.resume(checkpoint)
        if started.rank == 0:
            print(f"replaying {run} from iteration {nearest} to {wanted}")
        while made.trainer.steps_done < wanted:
            made.trainer.step()
        made.trainer.replicas.share_counts()
        tokens = made.trainer.tokens
        state = {"tokens": {name: int(count) for name, count in tokens.items()}, "cost": {}}
        inherited = RunDirectory(run).parent
        for name, count in (inherited.tokens if inherited is not None else {}).items():
            state["tokens"][name] = state["tokens"].get(name, 0) + count
        made.trainer.save(made.saver, state, blocking=True)
    finally:
        made.close()
    return there
