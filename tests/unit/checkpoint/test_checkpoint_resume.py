"""n + n steps equal 2n, bit for bit, on a CPU in the same layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import WORLD, trainer

from megarlx.checkpoint import CheckpointError, Saver, latest, load, read_manifest, verify
from megarlx.training.trainer import Trainer


def losses(one: Trainer, steps: int) -> list[dict[str, float]]:
    return [one.global_loss(one.step()[0]) for _ in range(steps)]


def state(one: Trainer) -> list[torch.Tensor]:
    optimizer = one.optimizer
    shards = [shard.clone() for shard in optimizer.shards.shards.values()]
    return [*shards, optimizer.steps.clone(), one.model.data_parallel.weights.clone()]


KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "tied": {"family": "qwen2"},
    "accumulation": {"microbatches": 2, "family": "olmo2"},
    "bf16": {"dtype": torch.bfloat16},
    "fp64": {"dtype": torch.float64, "family": "qwen3"},
    "two objectives": {"objectives": ("pretraining", "sft")},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocking", [False, True])
def test_n_plus_n_steps_are_2n_steps(tmp_path: Path, kind: str, blocking: bool) -> None:
    whole = trainer(**KINDS[kind])
    expected = losses(whole, 3)
    saver = Saver(tmp_path, WORLD)
    whole.save(saver, {"cursor": [1, 2]}, blocking=blocking)
    expected_rest = losses(whole, 3)  # goes on while the files are written
    saver.wait()
    assert len(expected) == 3

    resumed = trainer(**KINDS[kind], seed=99)
    found = latest(tmp_path)
    assert found is not None
    loaded = resumed.resume(found)
    assert loaded.state["run"]["cursor"] == [1, 2]
    assert resumed.steps_done == loaded.iteration == 3
    assert losses(resumed, 3) == expected_rest
    for a, b in zip(state(resumed), state(whole), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_saves_the_same_bytes(tmp_path: Path) -> None:
    first = trainer()
    losses(first, 2)
    one, two = Saver(tmp_path / "one", WORLD), Saver(tmp_path / "two", WORLD)
    first.save(one, {}, blocking=True)
    again = trainer(seed=5)
    again.resume(tmp_path / "one" / "iter_00000002")
    again.save(two, {}, blocking=True)
    assert one.last is not None
    assert two.last is not None
    assert one.last.digest == two.last.digest


def test_weights_in_bf16_are_rounded_from_the_masters_as_a_step_rounds_them(
    tmp_path: Path,
) -> None:
    first = trainer(dtype=torch.bfloat16)
    losses(first, 3)
    saver = Saver(tmp_path, WORLD)
    first.save(saver, {}, blocking=True)
    assert saver.last is not None
    assert {t.dtype for t in verify(saver.last.path).tensors.values()} == {"float32"}
    again = trainer(dtype=torch.bfloat16, seed=5)
    again.resume(saver.last.path)
    assert torch.equal(first.model.data_parallel.weights, again.model.data_parallel.weights)


def test_an_excursion_takes_the_weights_and_begins_anew(tmp_path: Path) -> None:
    parent = trainer()
    losses(parent, 3)
    saver = Saver(tmp_path, WORLD)
    parent.save(saver, {}, blocking=True)
    child = trainer(objectives=("sft",), seed=5)
    child.start_from(tmp_path / "iter_00000003")
    assert torch.equal(child.model.data_parallel.weights, parent.model.data_parallel.weights)
    assert child.steps_done == 0
    assert child.optimizer.steps.tolist() == [0]
    assert all(not m["exp_avg"].any() for m in child.optimizer.kept.shards.values())


def test_other_objectives_are_refused_by_their_moments(tmp_path: Path) -> None:
    parent = trainer()
    saver = Saver(tmp_path, WORLD)
    parent.save(saver, {}, blocking=True)
    child = trainer(objectives=("sft",))
    with pytest.raises(CheckpointError, match="it lacks optimizer/sft/exp_avg/") as error:
        child.resume(tmp_path / "iter_00000000")
    assert "it holds optimizer/pretraining/exp_avg/" in str(error.value)


def test_a_model_of_another_shape_is_refused_by_the_tensors_that_differ(tmp_path: Path) -> None:
    saver = Saver(tmp_path, WORLD)
    trainer().save(saver, {}, blocking=True)
    with pytest.raises(
        CheckpointError, match=r"attention.o.weight is float32 \[12, 12\]; expected .* \[12, 24\]"
    ):
        trainer(heads=4).resume(tmp_path / "iter_00000000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps_done": "3"}, "steps_done '3'"),
        ({"stage": 1}, "stage 1 .* below 1"),
        ({"positions": {}}, "nothing about 'pretraining'"),
        ({"optimizer": None}, "optimizer is None"),
        ({"optimizer": {"steps": {"sft": 1}}}, r"one count each of pretraining"),
        ({"optimizer": {"steps": {"pretraining": 1.5}}}, "steps are"),
        ({"optimizer": {"steps": {"pretraining": -1}}}, "steps are"),
        ({"optimizer": {"steps": {"pretraining": 1}}}, "was made by the update rule None"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    one = trainer()
    saver = Saver(tmp_path, WORLD)
    one.save(saver, {}, blocking=True)
    state = read_manifest(tmp_path / "iter_00000000").state | change
    saver.save(0, one.optimizer.shards, state, blocking=True)
    with pytest.raises(CheckpointError, match=message):
        trainer().resume(tmp_path / "iter_00000000")


def test_copies_on_a_rank_are_all_filled(tmp_path: Path) -> None:
    """As where one process holds both ends of a tie."""
    one = trainer("qwen2")
    losses(one, 1)
    saver = Saver(tmp_path, WORLD)
    one.save(saver, {}, blocking=True)
    optimizer = one.optimizer
    before = {p: shard.clone() for p, shard in optimizer.shards.shards.items()}
    load(tmp_path / "iter_00000001", optimizer.shards, WORLD)
    for prefix, shard in optimizer.shards.shards.items():
        assert torch.equal(shard, before[prefix])
