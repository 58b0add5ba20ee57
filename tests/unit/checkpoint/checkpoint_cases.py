"""A few small things to save: a trainer, and flat shards without a model."""

from __future__ import annotations

from pathlib import Path

import torch
from megarlx.objectives.pretraining import Pretraining

from megarlx.checkpoint import FlatShards, Saved, Saver
from megarlx.checkpoint.manifest import NAME, sign
from megarlx.comm.groups import Group, Mesh
from megarlx.config.model import family_config
from megarlx.model.build import build_model
from megarlx.optimizer import AdamSettings
from megarlx.parallel.data_parallel import FlatLayout
from megarlx.parallel.metadata import ParameterLayout, Piece
from megarlx.trainer import TrainedObjective, Trainer

WORLD = Group.alone("world")


def samples(first: int, count: int) -> torch.Tensor:
    rows = [torch.Generator().manual_seed(i) for i in range(first, first + count)]
    return torch.stack([torch.randint(61, (9,), generator=row) for row in rows])


def trainer(
    family: str = "llama3",
    *,
    seed: int = 1,
    microbatches: int = 1,
    dtype: torch.dtype = torch.float32,
    objectives: tuple[str, ...] = ("pretraining",),
    heads: int = 2,
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
        Pretraining(
            samples,
            sequences_per_step=4,
            sequences_per_microbatch=4 // microbatches,
            data_parallel=mesh.dp,
            name=name,
        )
        for name in objectives
    ]
    model = build_model(config, mesh, seed=seed, dtype=dtype, bucket_elements=700)
    adam = AdamSettings(weight_decay=0.1, clip_norm=0.5)
    return Trainer(model, [TrainedObjective(o, adam, lambda step: 1e-2 / (1 + step)) for o in made])


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
