"""`distill`: the model's distributions drawn to those of frozen teachers.

A rollout feeds `rollout_every_steps` steps, each of which trains on all of it: own samples, or
conversations that a run has kept. The teachers' last hidden states of it are computed once, in one
pass each; what a step needs of their distributions is made of these a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.config.distill import DistillConfig
from megarlx.model.build import ParallelModel
from megarlx.objectives.interface import Batch, Objective
from megarlx.objectives.logprobs import layout_for
from megarlx.objectives.packing import Layout
from megarlx.objectives.reference import weights_in_place
from megarlx.ops import Head, LossInputs, Teacher, TokenLoss, linear_distill_loss
from megarlx.ops.distill_loss import DISTILL_METRICS
from megarlx.parallel.microbatches import Microbatch
from megarlx.rollouts.completions import Completions
from megarlx.rollouts.json_tensors import from_json, to_json

FIELDS = ("tokens", "lengths", "written")  # of a rollout, that are saved


class Frozen(NamedTuple):
    """A teacher's weights as this rank's shard of them."""

    name: str  # RUN@N
    digest: str  # of its checkpoint
    shard: Tensor


class Texts(Protocol):
    """What is trained on: whole sequences, the same on all ranks of `group`."""

    group: Group
    waited_seconds: float

    def next(self) -> tuple[Completions, Mapping[str, float]]:
        """The next rollout, and tokens `generated` and `read` for it."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Distillation(Objective):
    def __init__(
        self,
        name: str,
        config: DistillConfig,
        model: ParallelModel,
        texts: Texts,
        teachers: Sequence[Frozen],
    ) -> None:
        self.name, self.config, self.model, self.texts = name, config, model, texts
        self.teachers = list(teachers)
        self.training_group = model.mesh.dp
        self.used = config.rollout_every_steps  # steps that the rollout has fed
        self.current: Completions | None = None
        self._prepared = False
        # Of the rollout: its batch and, by micro-batch, each teacher's states and head.
        self._batch: Batch | None = None
        self._taught: dict[int, list[Teacher]] = {}
        self._sums: list[Tensor] = []  # of the last step

    def set_groups(self, training_group: Group, generation_group: Group) -> None:
        self.training_group, self.texts.group = training_group, generation_group
        self._forget()

    def prepare(self) -> None:
        """Every step is counted here, also by ranks that only help to make the samples."""
        if self.current is None or self.used == self.config.rollout_every_steps:
            self.current, counts = self.texts.next()
            self.work.generated_tokens += counts["generated"]
            self.work.forward_tokens += counts["read"]
            self.waited_seconds += self.texts.waited_seconds
            self.texts.waited_seconds = 0.0
            self.used = 0
            self._forget()
        self.used += 1
        self._prepared = True

    def next_batch(self) -> Batch:
        if not self._prepared:
            self.prepare()
        self._prepared, self._sums = False, []
        if self._batch is None:
            assert self.current is not None
            self._batch = self._dealt(self.current)
            self._taught = self._ask_teachers(self._batch.microbatches)
            if self.used == 1:
                self.work.forward_tokens += len(self.current.tokens) * len(self.teachers)
        return self._batch

    def loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        result = linear_distill_loss(
            head,
            self._taught[id(inputs)],
            kl=self.config.kl,
            normalizer=normalizer,
            mask=inputs.mask,
            temperature=self.config.temperature,
        )
        self._sums.append(result.metrics)
        return result

    def state(self) -> dict[str, Any]:
        kept = None
        if self.current is not None and self.used < self.config.rollout_every_steps:
            kept = {name: to_json(getattr(self.current, name)) for name in FIELDS}
        return {
            "texts": self.texts.state(),
            "teachers": {one.name: one.digest for one in self.teachers},
            "used": self.used,
            "rollout": kept,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        teachers = {one.name: one.digest for one in self.teachers}
        if state["teachers"] != teachers:
            raise ValueError(
                f"{self.name}: the teachers were {state['teachers']}, by the digests of their "
                f"checkpoints, and are {teachers}; a run goes on with those that it had"
            )
        self.texts.load_state(state["texts"])
        self.used, self.current = int(state["used"]), None
        self._prepared = False
        self._forget()
        if state["rollout"] is not None:
            device = self.model.pipeline.device
            kept = {name: from_json(state["rollout"][name], device) for name in FIELDS}
            self.current = Completions(**kept)

    def metrics(self) -> dict[str, float]:
        """Divergence and the model's entropy, of a token of the last step."""
        sums = torch.zeros(len(DISTILL_METRICS), dtype=torch.float64)
        for one in self._sums:
            sums += one.cpu()
        for group in (self.training_group, self.model.mesh.pp):
            all_reduce_(sums, group)
        tokens, kl, entropy = sums.tolist()
        if not tokens:
            return {}
        before = "distill" if self.name == "distill" else f"distill/{self.name}"
        return {f"{before}/kl": kl / tokens, f"{before}/entropy": entropy / tokens}

    def close(self) -> None:
        self.texts.close()

    def _forget(self) -> None:
        self._batch, self._taught = None, {}

    def _dealt(self, completions: Completions) -> Batch:
        layout: Layout = layout_for(
            self.model, completions, self.config.tokens_per_microbatch, self.training_group
        )
        mask = layout.place(completions.written)
        return Batch(
            layout.microbatches(completions, {"mask": mask}),
            weight=mask.sum(dtype=torch.float64),
            tokens=layout.tokens,
        )

    def _ask_teachers(self, parts: Sequence[Microbatch]) -> dict[int, list[Teacher]]:
        """By the identity of a micro-batch's inputs; empty where the last stage is elsewhere."""
        found: dict[int, list[Teacher]] = {}
        for one, share in zip(self.teachers, self.config.shares, strict=True):
            heads: list[Tensor] = []

            def keep(
                head: Head,
                inputs: LossInputs,
                share: float = share,
                heads: list[Tensor] = heads,
            ) -> TokenLoss:
                if not heads:  # the weights in place are the model's own again afterwards
                    heads.append(head.weight.detach().clone())
                taught = Teacher(head.hidden.detach().clone(), heads[0], share)
                found.setdefault(id(inputs), []).append(taught)
                nothing = head.hidden.new_zeros(())
                return TokenLoss(nothing, nothing, nothing, nothing)

            with weights_in_place(self.model.data_parallel, one.shard):
                self.model.pipeline.forward_only(parts, keep)
        return found
