"""A loop of RL that a program writes itself: it draws samples, says what they are worth, learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megarlx.config import RlConfig
from megarlx.config.load import checked
from megarlx.config.optimizer import OptimizerConfig
from megarlx.data.prompts import PromptData
from megarlx.generation.requests import Completion
from megarlx.model.build import ParallelModel
from megarlx.objectives.policy import Reinforcement
from megarlx.rollouts.advantages import sample_advantages, uninformative
from megarlx.rollouts.completions import Completions
from megarlx.rollouts.rollout import Rollout
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

if TYPE_CHECKING:
    from megarlx.run.opened import OpenedRun


@dataclass(frozen=True)
class Samples:
    """As many of each prompt; `texts[p][i]` is what sample i of prompt p says."""

    texts: list[list[str]]
    made: tuple[Completion, ...]
    temperature: float


class Learner:
    """Policy optimisation on samples that are given, with AdamW, in the opened run's own weights:
    what the run generates after a step is the new policy's. No file is written.

    All ranks call all of it together, with the same samples and rewards.
    """

    def __init__(
        self,
        run: OpenedRun,
        lr: float,
        *,
        policy: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        tokens_per_microbatch: int = 4096,
    ) -> None:
        """policy   keys of [rl.policy], as {"preset": "dr_grpo"}"""
        model: ParallelModel = run.model
        given = {
            "policy": policy or {},
            "temperature": temperature,
            "tokens_per_microbatch": tokens_per_microbatch,
            "max_completion_tokens": run.config.model.max_sequence_length,
        }
        self.config = checked(RlConfig, given, "learner")
        rates = {"lr": lr, "weight_decay": weight_decay}
        checked(OptimizerConfig, rates, "learner")
        self._source = _Given(model, run.config.training.seed)
        self._objective = Reinforcement("rl", self.config, model, self._source)
        settings = UpdateSettings(weight_decay=weight_decay)
        trained = TrainedObjective(self._objective, settings, learning_rate=lambda _: lr)
        self._trainer = Trainer(model, [TrainingStage([trained])])

    def step(self, samples: Samples, rewards: Sequence[Sequence[float | None]]) -> dict[str, float]:
        """One optimizer step. `rewards[p][i]` is that of `samples.texts[p][i]`; None: not known.

        What comes back are the metrics of RL, "loss" among them.
        """
        wanted = [len(texts) for texts in samples.texts]
        given = [_count(of) for of in rewards]
        if given != wanted:
            raise ValueError(
                f"rewards are for {given} samples; drawn were {wanted}: a list for each prompt, "
                "with one number a sample"
            )
        if samples.temperature != self.config.temperature:
            raise ValueError(
                f"samples were drawn at temperature {samples.temperature:g}, and the learner's is "
                f"{self.config.temperature:g}: they are of another policy"
            )
        values = [[float("nan") if r is None else float(r) for r in of] for of in rewards]
        self._source.pending = self._rollout(samples, torch.tensor(values, dtype=torch.float64))
        losses, report = self._trainer.step()
        return {
            **self._objective.metrics(),
            "loss": float(self._trainer.global_loss(losses)["rl"]),
            "gradient_norm": float(report.gradient_norms["rl"]),
        }

    def _rollout(self, samples: Samples, rewards: torch.Tensor) -> Rollout:
        made, device = samples.made, self._objective.model.pipeline.device
        rewards = rewards.to(device)
        prompts, each = rewards.shape
        completions = Completions.of(
            [list(one.request.prompt) for one in made],
            [one.tokens.to(device) for one in made],
            rollout_logprobs=[one.sampled_logprobs.to(device) for one in made],
            truncated=[one.finish_reason == "length" for one in made],
        )
        metrics = {
            "rl/reward": float(rewards.nanmean()),
            "rl/response_length": sum(len(one.tokens) for one in made) / len(made),
            "rl/informative_groups": 1 - float(uninformative(rewards).double().mean()),
            "rl/generated_tokens": float(sum(len(one.tokens) for one in made)),
            "rl/prompt_tokens": float(sum(len(one.request.prompt) for one in made) / each),
        }
        advantages = sample_advantages(self.config.policy, rewards).flatten()
        groups = torch.arange(prompts, device=device).repeat_interleave(each)
        return Rollout(completions, rewards, advantages, groups, {}, metrics, [])


class _NoPrompts(PromptData):
    """The program has them: nothing here is resumed."""

    def __init__(self) -> None:
        self.drawn = 0

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


def _count(rewards: Any) -> int:
    """Of one prompt: a list, a tuple, a row of an array or of a tensor; 0 for a single number."""
    return len(rewards) if isinstance(rewards, Sized) and getattr(rewards, "ndim", 1) != 0 else 0


class _Given:
    """Where an objective's rollouts come from: the program's own."""

    def __init__(self, model: ParallelModel, seed: int) -> None:
        self.prompts: PromptData = _NoPrompts()
        self.group, self.seed = model.mesh.dp, seed
        self.waited_seconds = 0.0
        self.pending: Rollout | None = None

    def rollout(self, steps_done: int = 0) -> Rollout:
        rollout, self.pending = self.pending, None
        assert rollout is not None, "a step begins with its samples"
        return rollout

    def close(self) -> None:
        """There is nothing to close."""
