"""Small trainers with several objectives, and the same training written with torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.config.model import family_config
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.samples import Sample
from megarlx.model.build import ParallelModel, build_model
from megarlx.objectives.supervised import Supervised
from megarlx.ops import Head, LossInputs, TokenLoss
from megarlx.training.parts import UpdateSettings
from megarlx.training.shares import Shares
from megarlx.training.stages import TrainedObjective, TrainingStage

VOCABULARY, LENGTH, SEQUENCES = 61, 8, 4
ADAMS = {
    "a": UpdateSettings(weight_decay=0.1, clip_norm=0.5),
    "b": UpdateSettings(weight_decay=0.0, clip_norm=None, betas=(0.8, 0.99), eps=1e-6),
    "c": UpdateSettings(weight_decay=0.3, clip_norm=0.2, betas=(0.7, 0.9)),
}
RATES: dict[str, Callable[[int], float]] = {
    "a": lambda step: 1e-2 / (1 + step),
    "b": lambda step: 3e-3 * (1 + step),
    "c": lambda step: 5e-3,
}


class Numbers:
    """A dataset: sample i is a function of the name and i."""

    sequence_length = LENGTH

    def __init__(self, name: str) -> None:
        self.name = name

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng([*self.name.encode(), index]).integers(
            0, VOCABULARY, LENGTH + 1
        )
        return Sample(tokens[:-1], tokens[1:], None, (LENGTH,), 0)

    def fingerprint(self) -> dict[str, object]:
        return {"name": self.name}

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        return {self.name: consumed_sequences * LENGTH}


class Scaled(Supervised):
    """`scale` times the loss, from step to step."""

    scale: Callable[[int], float] = staticmethod(lambda step: 1.0)
    steps = 0

    def next_batch(self) -> Any:
        self.steps += 1
        return super().next_batch()

    def loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        result = super().loss(head, inputs, normalizer)
        return TokenLoss(
            result.loss * self.scale(self.steps - 1),
            result.logprobs,
            result.entropy,
            result.metrics,
        )


def objective(
    name: str, *, data: str | None = None, microbatches: int = 1, scale: Any = None
) -> Scaled:
    layout = BatchLayout(SEQUENCES, SEQUENCES // microbatches, 0, 1)
    made = Scaled(name, Loader(Numbers(data or name), layout, prefetch_steps=0))
    if scale is not None:
        made.scale = scale
    return made


def small_model(
    seed: int = 1, dtype: torch.dtype = torch.float64, mesh: Mesh | None = None
) -> ParallelModel:
    config = family_config(
        "olmo2",
        vocab_size=VOCABULARY,
        hidden_size=12,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=6,
        intermediate_size=20,
    )
    mesh = mesh or Mesh.alone()
    return build_model(config, mesh, seed=seed, dtype=dtype, bucket_elements=700)


def stage_of(
    names: Sequence[str] | Sequence[Supervised],
    *,
    adams: Mapping[str, UpdateSettings] = ADAMS,
    rates: Mapping[str, Callable[[int], float]] = RATES,
    turns: Mapping[str, int] | None = None,
    inherit: Sequence[str] = (),
    steps: int | None = None,
    combine: Any = "average",
    of_gradients: bool = False,
    shares: Shares | None = None,
) -> TrainingStage:
    made = [objective(one) if isinstance(one, str) else one for one in names]
    members = [
        TrainedObjective(
            one,
            adams[one.name],
            rates[one.name],
            (turns or {}).get(one.name, 1),
            one.name in inherit,
        )
        for one in made
    ]
    return TrainingStage(
        members, steps=steps, combine=combine, shared_moments=of_gradients, shares=shares
    )


def parameters_of(model: ParallelModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.data_parallel.parameters.items()}


class Textbook:
    """Weights as leaves of their own, gradients by autograd, updates by torch.optim.AdamW."""

    def __init__(self, adams: Mapping[str, UpdateSettings], seed: int = 1) -> None:
        self.copy = small_model(seed)
        self.layouts = self.copy.data_parallel.layouts
        self.weights = parameters_of(self.copy)
        self.adams = adams
        self.scratch = {name: self._leaves() for name in adams}
        self.optimizers = {
            name: torch.optim.AdamW(
                [
                    {
                        "params": [
                            p for n, p in leaves.items() if self._decays(n, adams[name]) == decays
                        ],
                        "weight_decay": adams[name].weight_decay if decays else 0.0,
                    }
                    for decays in (True, False)
                ],
                lr=1.0,
                betas=adams[name].betas,
                eps=adams[name].eps,
            )
            for name, leaves in self.scratch.items()
        }

    def _decays(self, name: str, adam: UpdateSettings) -> bool:
        if name == "embedding.weight" and not adam.decay_embeddings:
            return False
        return self.layouts[name].weight_decay

    def _leaves(self) -> dict[str, Tensor]:
        return {n: w.clone().requires_grad_() for n, w in self.weights.items()}

    def gradients(self, one: Scaled) -> dict[str, Tensor]:
        """Of the mean loss over the objective's next batch."""
        batch = one.next_batch()
        held = self.copy.data_parallel
        with torch.no_grad():
            for name, parameter in held.parameters.items():
                parameter.copy_(self.weights[name])
        held.gradients.zero_()
        (stage,) = self.copy.stages
        tokens = torch.cat([part.tokens for part in batch.microbatches])
        targets = torch.cat([part.inputs.targets for part in batch.microbatches])
        logits = stage.logits(stage(tokens))[:, :VOCABULARY]
        loss = F.cross_entropy(logits, targets.reshape(-1))
        (loss * one.scale(one.steps - 1)).backward()
        grads = {n: p.grad for n, p in held.parameters.items()}
        return {n: g.clone() for n, g in grads.items() if g is not None}

    def update(self, name: str, gradients: Mapping[str, Tensor], lr: float) -> dict[str, Tensor]:
        """What AdamW with the moments of `name` would add to the weights."""
        leaves = self.scratch[name]
        for n, leaf in leaves.items():
            leaf.data.copy_(self.weights[n])
            leaf.grad = gradients[n].clone()
        if (limit := self.adams[name].clip_norm) is not None:
            norm = torch.stack([leaf.grad.norm() for leaf in leaves.values()]).norm()  # type: ignore[union-attr]
            for leaf in leaves.values():
                leaf.grad *= (limit / norm).clamp(max=1.0)
        for group in self.optimizers[name].param_groups:
            group["lr"] = lr
        self.optimizers[name].step()
        return {n: leaf.detach() - self.weights[n] for n, leaf in leaves.items()}

    def add(self, updates: Mapping[str, Tensor], share: float = 1.0) -> None:
        self.weights = {n: w + share * updates[n] for n, w in self.weights.items()}


def assert_same_weights(model: ParallelModel, expected: Mapping[str, Tensor]) -> None:
    for name, weight in parameters_of(model).items():
        error = (weight - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert error < 1e-10, f"{name}: {error}"
