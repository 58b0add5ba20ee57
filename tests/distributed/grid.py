"""A small model trained in any layout, and what came of it put together in model space."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megarlx.comm.groups import Mesh
from megarlx.config.model import ModelConfig, family_config
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.samples import Sample
from megarlx.model.build import build_model
from megarlx.objectives.supervised import Supervised
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

SEQUENCES, LENGTH, STEPS, BUCKET = 16, 8, 5, 5000


@dataclass(frozen=True)
class Case:
    family: str = "llama3"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    sequence_parallel: bool = False
    microbatches: int = 4
    tied: bool = False
    recompute: str = "none"
    precision: str = "fp64"
    sequences: int = SEQUENCES
    device: str = "cpu"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def single(self) -> Case:
        return Case(
            self.family,
            microbatches=1,
            tied=self.tied,
            precision=self.precision,
            sequences=self.sequences,
        )

    def __str__(self) -> str:
        parts = [
            self.family,
            f"tp{self.tp}",
            f"pp{self.pp}",
            f"dp{self.dp}",
            f"mb{self.microbatches}",
        ]
        parts += [self.schedule] if self.schedule != "1f1b" else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += ["tied"] if self.tied else []
        parts += [self.recompute] if self.recompute != "none" else []
        parts += ["uneven"] if self.layers_per_stage else []
        return "-".join([*parts, self.precision])


OF_FAMILY: dict[str, Any] = {
    "gemma2": {"window": 5, "attention_cap": 2.0, "final_cap": 3.0},
    "gemma3": {"window": 5, "full_attention_every": 3, "window_rope_theta": 100.0},
}


def model(family: str, tied: bool) -> ModelConfig:
    # No two dimensions equal; two key heads, so that tp 4 and 8 hold copies of them.
    return family_config(
        family,
        vocab_size=203,
        hidden_size=24,
        layers=8,
        heads=8,
        kv_heads=2,
        head_dim=6,
        intermediate_size=40,
        tied_embeddings=tied,
        **OF_FAMILY.get(family, {}),
    )


class RandomSequences:
    """A dataset: sample i is a function of i."""

    sequence_length = LENGTH

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, 203, LENGTH + 1)
        return Sample(tokens[:-1], tokens[1:], None, (LENGTH,), 0)

    def fingerprint(self) -> dict[str, object]:
        return {}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {"random": consumed_sequences * LENGTH}


Chunks = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]


def chunks(trainer: Trainer, shard: torch.Tensor) -> Chunks:
    data_parallel = trainer.model.data_parallel
    found = []
    for piece, start, block in data_parallel.layout.chunks(
        data_parallel.layouts, data_parallel.group.rank
    ):
        if piece.counts_in_norm:
            part = shard[start : start + int(np.prod(block.size))].cpu().clone().numpy()
            found.append((piece.name, block.start, block.size, part.reshape(block.size)))
    return found


def train(case: Case) -> dict[str, Any]:
    """Runs on every rank: the chunks of the first gradient and of the last weights."""
    # gloo also for CUDA tensors: NCCL refuses two ranks on one GPU
    mesh = Mesh.build(
        pp=case.pp,
        dp=case.dp,
        tp=case.tp,
        timeout_seconds=30,
        backend="gloo",
        device=case.device,
    )
    built = build_model(
        model(case.family, case.tied),
        mesh,
        seed=7,
        schedule=case.schedule,  # type: ignore[arg-type]
        virtual_stages=case.virtual_stages,
        layers_per_stage=case.layers_per_stage,
        sequence_parallel=case.sequence_parallel,
        recompute=case.recompute,  # type: ignore[arg-type]
        dtype=torch.float64 if case.precision == "fp64" else torch.float32,
        bucket_elements=BUCKET,
        device=case.device,
    )
    layout = BatchLayout(
        case.sequences, case.sequences // case.dp // case.microbatches, mesh.dp.rank, mesh.dp.size
    )
    objective = Supervised(
        "pretraining", Loader(RandomSequences(), layout, prefetch_steps=0), device=case.device
    )
    # With tied embeddings, so that both copies have to know that they do not decay.
    adam = UpdateSettings(weight_decay=0.1, clip_norm=0.5, decay_embeddings=not case.tied)
    trainer = Trainer(
        built, [TrainingStage([TrainedObjective(objective, adam, lambda step: 1e-3)])]
    )
    losses, norms, gradient = [], [], None
    for _ in range(STEPS):
        mesh.traffic.reset()
        loss, report = trainer.step()
        sent = {key: count.bytes for key, count in mesh.traffic.counts.items()}
        if gradient is None:
            gradient = chunks(trainer, trainer.optimizer.gradient_shard("pretraining"))
        losses.append(trainer.global_loss(loss)["pretraining"])
        norms.append(report.gradient_norms["pretraining"].item())
    return {
        "gradient": gradient,
        "weights": chunks(trainer, trainer.optimizer.master),
        "losses": losses,
        "norms": norms,
        "sent": sent,
    }


def assemble(config: ModelConfig, parts: list[Chunks]) -> dict[str, np.ndarray]:
    """Global tensors from the chunks of all ranks, each element given exactly once."""
    shapes = config.tensor_shapes()
    whole = {name: np.zeros(shape) for name, shape in shapes.items()}
    given = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for name, start, size, values in itertools.chain(*parts):
        window = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        whole[name][window] = values
        given[name][window] += 1
    assert all((count == 1).all() for count in given.values())
    return whole
