"""A checkpoint of any layout goes on in any other: next-step losses and everything else equal.

In fp64, as in test_layout_grid.py. What was saved is compared bit for bit by saving it again from
the layout that loaded it.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import RandomSequences
from harness import Pool
from safetensors.numpy import load_file

from megarlx.checkpoint import (
    AVERAGE,
    WEIGHTS_ONLY,
    CheckpointError,
    FlatShards,
    Saver,
    latest,
    load,
    read_manifest,
    verify,
)
from megarlx.checkpoint.manifest import entry_name
from megarlx.comm.groups import Mesh
from megarlx.config.model import ModelConfig, family_config
from megarlx.data.loader import BatchLayout, Loader
from megarlx.model.build import build_model
from megarlx.objectives.supervised import Supervised
from megarlx.parallel.data_parallel import FlatLayout
from megarlx.parallel.metadata import ParameterLayout, Piece
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

SEQUENCES = 24


@dataclass(frozen=True)
class Place:
    """A layout to save in or to load into."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    layers_per_stage: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        uneven = "uneven" if self.layers_per_stage else ""
        other = self.schedule if self.schedule != "1f1b" else ""
        return "-".join(
            part for part in (f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", other, uneven) if part
        )


# tp 4 has copies of the two key heads; dp 3 cuts every bucket unevenly in model space; the
# V-shaped schedule has both ends of tied embeddings on one rank.
PLACES = [
    Place(),
    Place(dp=3),
    Place(tp=2),
    Place(pp=2),
    Place(tp=4),
    Place(dp=4, tp=2),
    Place(pp=4, layers_per_stage=(0, 1, 3, 0)),
    Place(tp=2, pp=2, dp=2, schedule="zbv", virtual_stages=2),
]
FAMILIES = {"llama3": False, "qwen2": True}  # tied or not


def nothing() -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def started(pool: Pool) -> None:
    """A few at a time: eight processes that import all of this at once on a busy machine of two
    cores can take longer than a process group waits for its members."""
    for count in (2, 4, 6, 8):
        pool.run(count, nothing)


def config_of(family: str) -> ModelConfig:
    return family_config(
        family,
        vocab_size=203,
        hidden_size=24,
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=6,
        intermediate_size=40,
        tied_embeddings=FAMILIES[family],
    )


def build(place: Place, family: str, seed: int, *objectives: str) -> Trainer:
    mesh = Mesh.build(pp=place.pp, dp=place.dp, tp=place.tp, timeout_seconds=30)
    model = build_model(
        config_of(family),
        mesh,
        seed=seed,
        schedule=place.schedule,  # type: ignore[arg-type]
        virtual_stages=place.virtual_stages,
        layers_per_stage=place.layers_per_stage,
        dtype=torch.float64,
        bucket_elements=1500,
    )
    sequences = SEQUENCES // place.dp // (2 if place.dp == 4 else 4)
    batches = BatchLayout(SEQUENCES, sequences, mesh.dp.rank, mesh.dp.size)
    made = [
        Supervised(name, Loader(RandomSequences(), batches, prefetch_steps=0))
        for name in objectives or ("pretraining",)
    ]
    adam = UpdateSettings(weight_decay=0.1, clip_norm=0.5)
    stage = TrainingStage([TrainedObjective(o, adam, lambda step: 1e-3) for o in made])
    return Trainer(model, [stage], average_decay=0.9)


def steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.global_loss(trainer.step()[0])["pretraining"] for _ in range(count)]


def train_and_save(place: Place, family: str, folder: Path, blocking: bool) -> list[float]:
    """Two steps, a save, and the losses of the two steps after it."""
    trainer = build(place, family, 7)
    steps(trainer, 2)
    saver = Saver(folder, trainer.mesh.world)
    trainer.save(saver, {}, blocking=blocking)
    after = steps(trainer, 2)
    saver.wait()
    return after


def resume_and_save(place: Place, family: str, checkpoint: Path, folder: Path) -> list[float]:
    trainer = build(place, family, 8)
    trainer.resume(checkpoint)
    trainer.save(Saver(folder, trainer.mesh.world), {}, blocking=True)
    return steps(trainer, 2)


def whole(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor put together from its chunks, read without the package's own reader."""
    manifest = verify(checkpoint)
    files = [load_file(checkpoint / file.name) for file in manifest.files]
    found = {}
    for name, tensor in manifest.tensors.items():
        found[name] = np.full(tensor.shape, np.nan)
        for chunk in tensor.chunks:
            window = tuple(slice(a, a + n) for a, n in zip(chunk.offset, chunk.size, strict=True))
            entry = entry_name(name, tensor.shape, chunk.offset, chunk.size)
            found[name][window] = files[chunk.file][entry]
        assert not np.isnan(found[name]).any()
    return found


def compare(run: Callable[..., Any], folder: Path, source: Place, target: Place) -> None:
    family = "qwen2" if (source.tp + target.pp) % 2 else "llama3"
    expected = run(source.world_size, train_and_save, source, family, folder / "a", False)[0]
    saved = latest(folder / "a")
    assert saved is not None
    found = run(target.world_size, resume_and_save, target, family, saved, folder / "b")
    for losses in found:
        np.testing.assert_allclose(losses, expected, rtol=1e-11)
    again = latest(folder / "b")
    assert again is not None
    ours, theirs = whole(again), whole(saved)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


GRID = list(itertools.product(PLACES, PLACES))
SOME = [
    (PLACES[0], PLACES[5]),
    (PLACES[7], PLACES[0]),
    *random.Random(1).sample(GRID, 4),
]


@pytest.mark.parametrize(("source", "target"), SOME, ids=str)
def test_a_checkpoint_goes_on_in_another_layout(
    run: Callable[..., Any], tmp_path: Path, source: Place, target: Place
) -> None:
    compare(run, tmp_path, source, target)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), GRID, ids=str)
def test_a_checkpoint_of_every_layout_goes_on_in_every_layout(
    run: Callable[..., Any], tmp_path: Path, source: Place, target: Place
) -> None:
    compare(run, tmp_path, source, target)


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    return config_of(family).tensor_shapes()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_padding_no_copy_and_a_tie_once_is_saved(
    run: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    place = PLACES[7]
    run(place.world_size, train_and_save, place, family, tmp_path, True)
    manifest = read_manifest(tmp_path / "iter_00000002")
    shapes = shapes_of(family)
    beside = [f"optimizer/pretraining/{kind}/" for kind in ("exp_avg", "exp_avg_sq")] + [AVERAGE]
    expected = {prefix + n: shape for prefix in ("", *beside) for n, shape in shapes.items()}
    assert {n: t.shape for n, t in manifest.tensors.items()} == expected
    numbers = sum(int(np.prod(shape)) for shape in expected.values())
    headers = 0
    for file in manifest.files:
        with open(tmp_path / "iter_00000002" / file.name, "rb") as opened:
            headers += 8 + int.from_bytes(opened.read(8), "little")
    assert sum(file.bytes for file in manifest.files) == headers + 8 * numbers


def resume_twice(place: Place, folder: Path) -> bool:
    """Whether 2 + 2 steps over a resume equal 4, bit for bit, on this rank."""
    first = build(place, "llama3", 7, "pretraining", "sft")
    steps(first, 2)
    saver = Saver(folder, first.mesh.world)
    first.save(saver, {})
    losses = steps(first, 2)
    saver.wait()
    second = build(place, "llama3", 8, "pretraining", "sft")
    found = latest(folder, second.mesh.world)
    assert found is not None
    second.resume(found)
    same = steps(second, 2) == losses
    for a, b in zip(
        first.optimizer.shards.shards.values(),
        second.optimizer.shards.shards.values(),
        strict=True,
    ):
        same = same and torch.equal(a, b)
    weights = (t.model.data_parallel.weights for t in (first, second))
    return same and torch.equal(*weights)


@pytest.mark.parametrize("place", [Place(dp=2, tp=2), PLACES[7]], ids=str)
def test_the_same_layout_resumes_bit_for_bit(
    run: Callable[..., Any], tmp_path: Path, place: Place
) -> None:
    assert all(run(place.world_size, resume_twice, place, tmp_path))


def weights_only(place: Place, folder: Path) -> list[list[float]]:
    parent = build(place, "qwen2", 7)
    steps(parent, 1)
    parent.save(Saver(folder, parent.mesh.world), {}, blocking=True)
    child = build(place, "qwen2", 8)
    child.start_from(folder / "iter_00000001")
    a, b = (t.model.data_parallel.weights for t in (parent, child))
    return [a.tolist(), b.tolist()]


def test_an_excursion_starts_with_its_parents_weights_on_every_rank(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    place = Place(tp=2, pp=2, dp=2)
    for parent, child in run(place.world_size, weights_only, place, tmp_path):
        assert parent == child


def refused(function: Callable[[], Any]) -> str:
    try:
        function()
    except CheckpointError as error:
        return str(error)
    return ""


def load_damaged(folder: Path) -> str:
    trainer = build(Place(dp=4), "llama3", 7)
    before = trainer.optimizer.master.clone()
    text = refused(lambda: trainer.resume(folder / "iter_00000002"))
    assert torch.equal(trainer.optimizer.master, before)
    return text


def test_damage_that_one_rank_sees_is_refused_by_all_with_the_same_words(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    run(4, train_and_save, Place(tp=4), "llama3", tmp_path, True)
    path = tmp_path / "iter_00000002" / "model-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    texts = run(4, load_damaged, tmp_path)
    assert len(set(texts)) == 1
    assert "model-00002.safetensors is damaged: its SHA-256 is" in texts[0]
    assert "rank " in texts[0]


def fail_on_one_rank(folder: Path, blocking: bool) -> tuple[str, str, bool]:
    trainer = build(Place(dp=3), "llama3", 7)
    saver = Saver(folder, trainer.mesh.world)
    trainer.save(saver, {}, blocking=True)
    steps(trainer, 1)
    write = os.write
    if trainer.mesh.rank == 2:

        def full(file: int, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

        os.write = full
    try:
        trainer.save(saver, {}, blocking=blocking)
        text = refused(saver.wait) if not blocking else ""
    except CheckpointError as error:
        text = str(error)
    finally:
        os.write = write
    latest_path = latest(folder, trainer.mesh.world)
    assert latest_path is not None
    steps(trainer, 1)
    trainer.save(saver, {})  # and the next one is well
    saved = saver.wait()
    return text, latest_path.name, saved is not None and saved.iteration == 2


@pytest.mark.parametrize("blocking", [False, True])
def test_a_disk_full_on_one_rank_is_every_ranks_error_and_the_last_checkpoint_stays(
    run: Callable[..., Any], tmp_path: Path, blocking: bool
) -> None:
    results = run(3, fail_on_one_rank, tmp_path, blocking)
    assert len(set(results)) == 1
    text, last, recovered = results[0]
    assert "saving iteration 1 (the last good checkpoint is" in text
    assert "rank 2: writing" in text
    assert "No space left on device" in text
    assert (last, recovered) == ("iter_00000000", True)
    assert sorted(os.listdir(tmp_path)) == ["iter_00000000", "iter_00000002", "latest"]


def differing_state(folder: Path) -> str:
    mesh = Mesh.build(dp=2, timeout_seconds=30)
    trainer = build(Place(dp=2), "llama3", 7)
    saver = Saver(folder, mesh.world)
    return refused(lambda: trainer.save(saver, {"cursor": 10 + mesh.rank}))


def test_a_state_that_differs_between_ranks_is_refused(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    for text in run(2, differing_state, tmp_path):
        assert "the state differs between rank 0 and rank 1" in text
        assert '"cursor": 10' in text
        assert '"cursor": 11' in text


def save_replicas(folder: Path) -> bool:
    """Each replica has the weights and the moments of one objective; so has it after a load."""
    mesh = Mesh.build(replica=2, timeout_seconds=30)
    own = ("pretraining", "rl")[mesh.replica.rank]
    model = build_model(config_of("llama3"), mesh, seed=7, dtype=torch.float64)
    layout, layouts = model.data_parallel.layout, model.data_parallel.layouts
    weights = model.data_parallel.weights
    moment = torch.full_like(weights, 1.0 + mesh.replica.rank)
    shards = FlatShards(layout, layouts, 0, {"": weights, f"optimizer/{own}/exp_avg/": moment})
    Saver(folder, mesh.world).save(1, shards, {}, blocking=True)
    zeros = {prefix: torch.zeros_like(shard) for prefix, shard in shards.shards.items()}
    target = FlatShards(layout, layouts, 0, zeros)
    load(folder / "iter_00000001", target, mesh.world)
    wanted = shards.tensors(counted_only=False)
    return all(
        torch.equal(found, expected)
        for name, tensor in target.tensors(counted_only=False).items()
        for (_, found), (_, expected) in zip(tensor.blocks, wanted[name].blocks, strict=True)
    )


def test_weights_that_replicas_share_are_saved_once_and_moments_by_their_owner(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    assert run(2, save_replicas, tmp_path) == [True, True]
    manifest = verify(tmp_path / "iter_00000001")
    shapes = shapes_of("llama3")
    expected = {f"optimizer/{o}/exp_avg/" for o in ("pretraining", "rl")} | {""}
    assert set(manifest.tensors) == {prefix + name for prefix in expected for name in shapes}
    # The planner shares the work: both ranks write some of the weights.
    assert {f.name for f in manifest.files} == {
        f"{kind}-0000{rank}.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)
    }
    weights = [t for n, t in manifest.tensors.items() if not n.startswith("optimizer/")]
    written = {manifest.files[chunk.file].name for t in weights for chunk in t.chunks}
    assert written == {"model-00000.safetensors", "model-00001.safetensors"}


def overlapping(folder: Path) -> str:
    mesh = Mesh.build(dp=2, timeout_seconds=30)
    rows = [4, 5][mesh.dp.rank]  # rank 1 claims a row that rank 0 has
    piece = Piece("w", (8, 3), 0, 0, 3 * mesh.dp.rank, rows, (mesh.dp.rank,), False, True)
    layouts = {"w": ParameterLayout((rows, 3), (piece,), True)}
    flat = FlatLayout.make([("w", (rows, 3), True)], 1)
    shards = FlatShards(flat, layouts, 0, {"": torch.zeros(flat.shard_size)})
    return refused(lambda: Saver(folder, mesh.world).save(1, shards, {}))


def test_ranks_whose_parts_overlap_are_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    for text in run(2, overlapping, tmp_path / "checkpoints"):
        assert "parts do not make up the tensors: " in text
        # torch 2.11 says no more than the first; it is torch's planner that finds the overlap.
        assert "Failed to validate global plan" in text or "overlapping chunks" in text
    assert not (tmp_path / "checkpoints").exists()


def poll_in_step(folder: Path) -> list[bool]:
    """One rank's disk is slow: no rank may think the save done before it is."""
    trainer = build(Place(dp=2), "llama3", 7)
    saver = Saver(folder, trainer.mesh.world)
    sync, pauses = os.fsync, [1.0]
    if trainer.mesh.rank == 1:

        def slow(file: int) -> None:
            time.sleep(pauses.pop() if pauses else 0.0)
            sync(file)

        os.fsync = slow
    try:
        trainer.save(saver, {})
        first = saver.poll() is None and latest(folder) is None
        done = saver.wait()
    finally:
        os.fsync = sync
    return [first, done is not None, latest(folder) is not None, saver.poll() is None]


def test_latest_moves_when_the_slowest_rank_is_done(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    assert run(2, poll_in_step, tmp_path) == [[True] * 4] * 2


def load_weights_elsewhere(place: Place, checkpoint: Path) -> list[tuple[str, list[int]]]:
    """The global tensors of which this rank holds a part, after loading the weights alone."""
    trainer = build(place, "qwen2", 8)
    shards = trainer.optimizer.starting_shards([])
    load(checkpoint, shards, trainer.mesh.world, ignore=WEIGHTS_ONLY)
    expected = whole(checkpoint)
    for name, tensor in shards.tensors(counted_only=False).items():
        for block, values in tensor.blocks:
            window = tuple(slice(a, a + n) for a, n in zip(block.start, block.size, strict=True))
            np.testing.assert_array_equal(values.numpy(), expected[name][window], err_msg=name)
    return [(n, list(t.shape)) for n, t in shards.tensors(counted_only=False).items()]


@pytest.mark.parametrize("place", [PLACES[4], PLACES[7], PLACES[6]], ids=str)
def test_every_copy_on_every_rank_is_filled(
    run: Callable[..., Any], tmp_path: Path, place: Place
) -> None:
    run(2, train_and_save, Place(dp=2), "qwen2", tmp_path, True)
    held = run(place.world_size, load_weights_elsewhere, place, tmp_path / "iter_00000002")
    assert {n for rank in held for n, _ in rank} == set(shapes_of("qwen2"))
