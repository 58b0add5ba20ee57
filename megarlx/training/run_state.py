"""What of a trainer a checkpoint holds: a run saved, resumed, and an excursion's start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarlx.checkpoint import (
    AVERAGE,
    FROZEN,
    OPTIMIZER,
    CheckpointError,
    Loaded,
    Pause,
    Saver,
    load,
    read_manifest,
)
from megarlx.objectives.interface import Work

if TYPE_CHECKING:
    from megarlx.training.trainer import Trainer


def save(trainer: Trainer, saver: Saver, run: Mapping[str, Any], *, blocking: bool) -> Pause:
    if not trainer.in_sync:
        raise ValueError(
            f"checkpoint: step {trainer.steps_done} is {trainer.step_in_stage} steps into its "
            "stage, between two averages; allowed are multiples of "
            f"{trainer.stage.times.sync_every}"
        )
    trainer.replicas.share_counts()
    state = {
        "steps_done": trainer.steps_done,
        "stage": trainer.stage_index,
        "positions": dict(trainer.positions),
        "tokens": {name: int(tokens) for name, tokens in trainer.tokens.items()},
        "work": {name: asdict(one.work) for name, one in trainer.objectives.items()},
        "optimizer": trainer.optimizer.state(),
        "objectives": trainer.replicas.states(),
        "shares": trainer.stage.state(),
        "run": run,
    }
    return saver.save(trainer.steps_done, trainer.optimizer.shards, state, blocking=blocking)


def resume(trainer: Trainer, checkpoint: Path) -> Loaded:
    state = read_manifest(checkpoint).state
    index, steps = state.get("stage"), state.get("steps_done")
    if type(index) is not int or not 0 <= index < len(trainer.stages) or type(steps) is not int:
        raise CheckpointError(
            f"{checkpoint}: the state has stage {index!r} and steps_done {steps!r}; expected "
            f"whole numbers, the stage below {len(trainer.stages)}"
        )
    if index != trainer.stage_index:
        trainer.enter(index)
    loaded = load(checkpoint, trainer.optimizer.shards, trainer.mesh.world)
    _restore(trainer, loaded, trainer.objectives)
    for name, tokens in _part(loaded, "tokens").items():
        trainer.tokens[name].fill_(tokens)
    for name, work in _part(loaded, "work").items():
        trainer.objectives[name].work = Work(**work)
    trainer.optimizer.restore(_part(loaded, "optimizer"))
    trainer.stage.load_state(_part(loaded, "shares"))
    trainer.steps_done = steps
    return loaded


def start_from(trainer: Trainer, checkpoint: Path, weights: str = "") -> Loaded:
    going_on = sorted(trainer.timeline.from_before)
    manifest = read_manifest(checkpoint)
    if weights and going_on:
        raise CheckpointError(
            f"{checkpoint}: the average of the weights has no moments, with which "
            f"{', '.join(going_on)} could go on"
        )
    held = {name.split("/")[1] for name in manifest.tensors if name.startswith(OPTIMIZER)}
    if missing := [name for name in going_on if name not in held]:
        summed = manifest.state.get("run", {}).get("sum")
        why = f": it is a {summed}, of weights alone" if summed else ""
        raise CheckpointError(
            f"{checkpoint}: holds no moments of {', '.join(missing)} to go on with; it has "
            f"those of {', '.join(sorted(held)) or 'no objective'}{why}"
        )
    trainer.optimizer.kept.check_rules(manifest.state.get("optimizer", {}), going_on)
    others = [f"{OPTIMIZER}{name}/" for name in held if name not in going_on]
    ignore = [] if weights else [FROZEN, AVERAGE, *others]
    shards = trainer.optimizer.starting_shards(going_on, weights)
    loaded = load(checkpoint, shards, trainer.mesh.world, ignore=ignore, only=weights)
    _restore(trainer, loaded, going_on)
    trainer.optimizer.restore(_part(loaded, "optimizer"), going_on)
    if trainer.average is not None:
        trainer.average.begin(trainer.optimizer.master)
    # Frozen reference shards were copied before the parent's weights were loaded: copy them again.
    for shard in trainer.optimizer.frozen.values():
        shard.copy_(trainer.model.data_parallel.shard_of_weights())
    return loaded


def _restore(trainer: Trainer, loaded: Loaded, names: Iterable[str]) -> None:
    positions, states = _part(loaded, "positions"), _part(loaded, "objectives")
    for name in names:
        if name not in states or name not in positions:
            raise CheckpointError(f"{loaded.path}: its state has nothing about '{name}'")
        trainer.objectives[name].load_state(states[name])
        trainer.positions[name] = int(positions[name])


def _part(loaded: Loaded, key: str) -> dict[str, Any]:
    value = loaded.state.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{loaded.path}: the state's {key} is {value!r}; expected an object")
    return value
