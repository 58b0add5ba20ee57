"""A few small things to save: a trainer, and flat shards without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megarlx.checkpoint import FlatShards, Saved, Saver
from megarlx.checkpoint.manifest import NAME, sign
from megarlx.comm.groups import Group, Mesh
from megarlx.config.model import family_config
from megarlx.data.loader import BatchLayout, Loader, Sample
from megarlx.model.build import build_model
from megarlx.objectives.supervised import Supervised
from megarlx.parallel.data_parallel import FlatLayout
from megarlx.parallel.metadata import ParameterLayout, Piece
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

WORLD = Group.alone("world")


class Sequences:
    """A dataset: sample i is a function of i."""

    sequence_length = 8

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, 61, 9)
        return Sample(tokens[:-1], tokens[1:], None, (8,), 0)

    def fingerprint(self) -> dict[str, object]:
        return {}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {"random": consumed_sequences * 8}


def trainer(
    family: str = "llama3",
    *,
    seed: int = 1,
    microbatches: int = 1,
    dtype: torch.dtype = torch.float32,
    objectives: tuple[str, ...] = ("pretraining",),
    heads: int = 2,
    average_decay: float | None = None,
) -> Trainer:
    config = family_config(
        family,
        vocab_size=61,
        hidden_size=12,
        layers=2,
        heads=heads,
        kv_heads=1,
        head_dim=6,
        intermediate_size=20,
        tied_embeddings=family == "qwen2",
    )
    mesh = Mesh.alone()
    made = [
        Supervised(
            name,
            Loader(Sequences(), BatchLayout(4, 4 // microbatches, 0, 1), prefetch_steps=0),
        )
        for name in objectives
    ]
    model = build_model(config, mesh, seed=seed, dtype=dtype, bucket_elements=700)
    adam = UpdateSettings(weight_decay=0.1, clip_norm=0.5)
    return Trainer(
        model,
        [TrainingStage([TrainedObjective(o, adam, lambda step: 1e-2 / (1 + step)) for o in made])],
        average_decay,
    )


def layout_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, ParameterLayout]:
    return {
        name: ParameterLayout(
            shape, (Piece(name, shape, 0, 0, 0, shape[0], (0,), False, True),), True
        )
        for name, shape in shapes.items()
    }


def flat_shards(value: float = 0.0, shapes: dict[str, tuple[int, ...]] | None = None) -> FlatShards:
    """A matrix and a vector and their first moments, filled with `value` and `value` + 0.5."""
    layouts = layout_of(shapes or {"embedding.weight": (5, 3), "norm.weight": (7,)})
    flat = FlatLayout.make([(n, p.shape, True) for n, p in layouts.items()], 1)
    weights = torch.full((flat.shard_size,), value)
    moments = torch.full((flat.shard_size,), value + 0.5)
    return FlatShards(flat, layouts, 0, {"": weights, "optimizer/sft/exp_avg/": moments})


def saved(folder: Path, iteration: int = 1, value: float = 1.0) -> Saved:
    saver = Saver(folder, WORLD)
    saver.save(iteration, flat_shards(value), {"cursor": iteration}, blocking=True)
    assert saver.last is not None
    return saver.last


def resign(checkpoint: Path, text: str) -> None:
    """Writes a changed manifest with a digest that fits, as somebody who means harm would."""
    head = text.rpartition('"digest": "')[0]
    (checkpoint / NAME).write_text(sign(head))
