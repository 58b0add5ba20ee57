"""The moving average of weights: its values, its resume, what starts from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_cases import WORLD, trainer

from megarlx.checkpoint import AVERAGE, CheckpointError, Saver, read_manifest
from megarlx.training.trainer import Trainer

DECAY = 0.9


def saved(one: Trainer, folder: Path) -> Path:
    saver = Saver(folder, WORLD)
    one.save(saver, {}, blocking=True)
    assert saver.last is not None
    return saver.last.path


def average(one: Trainer) -> torch.Tensor:
    assert one.average is not None
    return one.average.shard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_follows_the_masters_and_leaves_training_as_it_is(dtype: torch.dtype) -> None:
    with_one, without = trainer(dtype=dtype, average_decay=DECAY), trainer(dtype=dtype)
    expected = with_one.optimizer.master.clone()
    for _ in range(4):
        with_one.step()
        without.step()
        master = with_one.optimizer.master
        expected = (expected - master) * DECAY + master
    assert torch.equal(average(with_one), expected)
    assert average(with_one).dtype == with_one.optimizer.master.dtype
    assert not torch.equal(average(with_one), with_one.optimizer.master)
    assert torch.equal(with_one.optimizer.master, without.optimizer.master)


def test_n_and_n_steps_end_with_the_average_of_2n(tmp_path: Path) -> None:
    whole = trainer(average_decay=DECAY)
    for _ in range(2):
        whole.step()
    checkpoint = saved(whole, tmp_path)
    parts = trainer(seed=5, average_decay=DECAY)
    parts.resume(checkpoint)
    for one in (whole, parts):
        for _ in range(2):
            one.step()
    assert torch.equal(average(whole), average(parts))


def test_a_checkpoint_holds_an_average_of_every_weight_or_none(tmp_path: Path) -> None:
    for decay in (DECAY, None):
        names = set(
            read_manifest(saved(trainer(average_decay=decay), tmp_path / f"{decay}")).tensors
        )
        weights = {name for name in names if "/" not in name}
        held = {name.removeprefix(AVERAGE) for name in names if name.startswith(AVERAGE)}
        assert held == (weights if decay else set())


def test_an_excursion_starts_from_the_average_where_one_is_kept(tmp_path: Path) -> None:
    parent = trainer(average_decay=DECAY)
    for _ in range(3):
        parent.step()
    checkpoint = saved(parent, tmp_path / "with")
    for decay in (None, DECAY):
        child = trainer(objectives=("sft",), seed=5, average_decay=decay)
        child.start_from(checkpoint, AVERAGE)
        assert torch.equal(child.optimizer.master, average(parent))
        assert torch.equal(child.model.data_parallel.weights, average(parent))
        if decay is not None:
            assert torch.equal(average(child), average(parent))
        child.start_from(checkpoint)
        assert torch.equal(child.optimizer.master, parent.optimizer.master)
    without = saved(trainer(), tmp_path / "without")
    with pytest.raises(CheckpointError, match="keeps no average of the weights"):
        trainer(objectives=("sft",)).start_from(without, AVERAGE)
