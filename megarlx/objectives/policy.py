"""`rl`: policy optimisation on the model's own samples, as an objective like any other.

A rollout feeds `steps_per_rollout` x `epochs_per_rollout` optimizer steps. What is left of one at
the end of a step is part of the state, so that a run can stop and go on anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.config.objectives import RL, RlConfig
from megarlx.config.policy import PolicyConfig
from megarlx.data.order import key_of, shuffled
from megarlx.model.build import ParallelModel
from megarlx.objectives.interface import Batch, Objective
from megarlx.objectives.logprobs import layout_for, training_logprobs
from megarlx.objectives.losses import loss_spec, try_loss
from megarlx.objectives.packing import Layout, policy_batch
from megarlx.objectives.policy_loss import gap_sums, log_ratios, policy_fields
from megarlx.objectives.reference import frozen_copy, weights_in_place
from megarlx.ops import Head, LossInputs, TokenLoss
from megarlx.rollouts.advantages import compares_turns, sample_advantages
from megarlx.rollouts.completions import Completions, places_of, select
from megarlx.rollouts.json_tensors import from_json, to_json
from megarlx.rollouts.rollout import Rollout, RolloutSource

KeepSamples = Callable[[int, list[dict[str, Any]]], bool]  # rollout's number, examples: kept?


class Reinforcement(Objective):
    def __init__(
        self,
        name: str,
        config: RlConfig,
        model: ParallelModel,
        sampler: RolloutSource,
        *,
        keep_samples: KeepSamples | None = None,
    ) -> None:
        self.name, self.config, self.model, self.sampler = name, config, model, sampler
        self.spec = loss_spec(config.policy)
        try_loss(self.spec, self._precision, model.pipeline.device)
        if compares_turns(config.policy) and config.environment is None:
            raise ValueError(
                f"{name}.policy.advantage is '{config.policy.advantage}', which compares turns; it "
                "needs an environment"
            )
        self.keep_samples = keep_samples
        self.reference: Tensor | None = None
        self.rollouts = 0  # made so far
        self.used = 0  # steps that the current rollout has fed
        self.current: Rollout | None = None
        # Of the step under way, for metrics.
        self._layout: Layout | None = None
        self._minibatch: Completions | None = None
        self._seen: list[TokenLoss] = []
        self._first_of_rollout = False
        self._examples: list[dict[str, Any]] = []
        self._signal: float | None = None
        self._prepared = False
        self.training_group = model.mesh.dp

    @property
    def _precision(self) -> torch.dtype:
        return torch.float64 if self.model.pipeline.dtype == torch.float64 else torch.float32

    # What the trainer asks.

    def begin(self, weights: Tensor, inherit: bool) -> Tensor | None:
        if self.config.policy.needs_reference and (self.reference is None or not inherit):
            self.reference = frozen_copy(weights)
        return self.reference

    def set_groups(self, training_group: Group, generation_group: Group) -> None:
        self.training_group, self.sampler.group = training_group, generation_group

    def prepare(self) -> None:
        """Every step is counted here, also by ranks that only help to make the samples."""
        if self.current is None or self.used == self.config.steps_of_a_rollout:
            self._new_rollout()
        self.used += 1
        self._prepared = True

    def next_batch(self) -> Batch:
        if not self._prepared:
            self.prepare()
        self._prepared = False
        rollout, step = self.current, self.used - 1
        assert rollout is not None
        chosen = self._sequences_of(rollout, step)
        minibatch = select(rollout.completions, chosen)
        config = self.config
        chosen_fields = policy_fields(
            config.policy,
            minibatch,
            _advantages_of(rollout, chosen).to(self._precision),
            max_completion_tokens=config.most_written_tokens,
        )
        self._layout = layout_for(
            self.model, minibatch, config.tokens_per_microbatch, self.training_group
        )
        self._minibatch, self._seen = minibatch, []
        self._first_of_rollout = step == 0
        return policy_batch(minibatch, chosen_fields, self._layout, self.spec)

    def loss(self, head: Head, inputs: LossInputs, normalizer: Tensor) -> TokenLoss:
        result = head.token_loss(
            inputs,
            self.spec,
            normalizer=normalizer,
            temperature=self.config.temperature,
            as_it_is=type(self).loss is Reinforcement.loss,
        )
        self._seen.append(
            TokenLoss(
                result.loss.detach(), result.logprobs, result.entropy, result.metrics.detach()
            )
        )
        return result

    def signal(self) -> float | None:
        return self._signal

    def metrics(self) -> dict[str, float]:
        """Of the last step, and of the rollout that it was made with."""
        if self.current is None or self._minibatch is None:
            return {}
        found = dict(self.current.metrics)
        found |= self._loss_metrics()
        if self.name == RL:
            return found
        # Several of them in one run: each under its name.
        return {f"rl/{self.name}/{k[3:]}" if k[:3] == "rl/" else k: v for k, v in found.items()}

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "prompts": self.sampler.prompts.state(),
            "rollouts": self.rollouts,
            "used": self.used,
            "signal": self._signal,
            "rollout": None,
        }
        if self.current is not None and self.used < self.config.steps_of_a_rollout:
            made = self.current.completions
            state["rollout"] = {
                "completions": {
                    f.name: to_json(getattr(made, f.name))
                    for f in fields(made)
                    if getattr(made, f.name) is not None
                },
                "rewards": to_json(self.current.rewards),
                "advantages": to_json(self.current.advantages),
                "groups": to_json(self.current.groups),
                # times differ between ranks, and are nobody's concern later
                "metrics": {k: v for k, v in self.current.metrics.items() if k[:5] != "perf/"},
            }
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.sampler.prompts.load_state(state["prompts"])
        self.rollouts, self.used = int(state["rollouts"]), int(state["used"])
        self._signal = state["signal"]
        self._minibatch, self._layout, self._seen = None, None, []
        self._prepared = False
        self.current, kept = None, state["rollout"]
        if kept is None:
            self.used = self.config.steps_of_a_rollout  # the next step makes a new one
            return
        device = self.model.pipeline.device
        self.current = Rollout(
            Completions(**{k: from_json(v, device) for k, v in kept["completions"].items()}),
            from_json(kept["rewards"], device),
            from_json(kept["advantages"], device),
            from_json(kept["groups"], device),
            {},
            dict(kept["metrics"]),
            [],
        )

    def new_examples(self) -> list[dict[str, Any]]:
        examples, self._examples = self._examples, []
        return examples

    def close(self) -> None:
        self.sampler.close()

    # How a step is made.

    def _new_rollout(self) -> None:
        generation_group = self.sampler.group
        rollout = self.sampler.rollout(self.rollouts * self.config.steps_of_a_rollout)
        self.waited_seconds += self.sampler.waited_seconds
        self.sampler.waited_seconds = 0.0
        policy = self.config.policy
        made = rollout.completions
        moves = self.config.steps_of_a_rollout > 1
        off_reward = policy.kl == "reward"
        if moves or off_reward or policy.importance_cap:
            made = replace(made, old_logprobs=self._logprobs(made, generation_group))
        if policy.needs_reference:
            assert self.reference is not None
            with weights_in_place(self.model.data_parallel, self.reference):
                made = replace(made, ref_logprobs=self._logprobs(made, generation_group))
        self.current = replace(rollout, completions=made)
        if off_reward:
            self.current = _less_divergence(self.current, policy)
        self.used = 0
        self.work.generated_tokens += rollout.metrics["rl/generated_tokens"]
        self.work.forward_tokens += rollout.metrics["rl/prompt_tokens"]
        self._signal = rollout.metrics["rl/informative_groups"]
        keep = (
            self.keep_samples
            if generation_group.is_first and self.model.mesh.model.is_first
            else None
        )
        if keep is not None:
            examples = self.current.shown()
            if keep(self.rollouts, examples):
                self._examples = examples
        self.rollouts += 1

    def _logprobs(self, completions: Completions, group: Group) -> Tensor:
        self.work.forward_tokens += len(completions.tokens)
        return training_logprobs(
            self.model,
            completions,
            temperature=self.config.temperature,
            tokens_per_microbatch=self.config.tokens_per_microbatch,
            group=group,
        )

    def _sequences_of(self, rollout: Rollout, step: int) -> Tensor:
        """The sequences of a step: whole groups, in another order in each epoch."""
        config = self.config
        groups = len(rollout.rewards)
        if config.steps_of_a_rollout == 1:
            return torch.arange(rollout.sequences, device=rollout.groups.device)
        epoch, part = divmod(step, config.steps_per_rollout)
        key = key_of(self.sampler.seed, self.name, self.rollouts, epoch)
        order = shuffled(groups, key).tolist()
        bounds = [groups * i // config.steps_per_rollout for i in (part, part + 1)]
        mine = order[bounds[0] : bounds[1]] or order[:1]  # fewer groups than steps
        chosen = torch.tensor(mine, dtype=torch.int64, device=rollout.groups.device)
        return torch.isin(rollout.groups, chosen).nonzero().flatten()

    def _loss_metrics(self) -> dict[str, float]:
        """Entropy, divergence and clipping of the last step; how far sampler and trainer are."""
        mesh, layout, minibatch = self.model.mesh, self._layout, self._minibatch
        assert layout is not None
        assert minibatch is not None
        names = self.spec.metrics
        sums = torch.zeros(len(names) + 3, dtype=torch.float64)
        most = torch.zeros(2, dtype=torch.float64)
        if self._seen:
            table = torch.stack([s.metrics.double() for s in self._seen]).cpu()
            sums[: len(names)] = table.sum(0)
            most[0] = table[:, names.index("ratio_max")].max()
            if self._first_of_rollout and minibatch.rollout_logprobs is not None:
                # Only before the policy has moved are both of the same policy.
                trained = torch.stack([s.logprobs for s in self._seen]).reshape(layout.source.shape)
                sampled = layout.place(minibatch.rollout_logprobs).to(trained.dtype)
                written = layout.place(minibatch.written) & (trained != 0)
                gap = gap_sums(sampled, trained, written)
                for at, key in enumerate(("gap", "kl", "tokens")):
                    sums[len(names) + at] = gap[key].cpu()
                most[1] = gap["gap_max"].cpu()
        for group in (self.training_group, mesh.pp):
            all_reduce_(sums, group)
            all_reduce_(most, group, op="max")
        total = dict(zip(names, sums.tolist(), strict=False))
        tokens = max(total["tokens"], 1.0)
        found = {
            "rl/entropy": total["entropy"] / tokens,
            "rl/clip_fraction": total["clip_fraction"] / tokens,
            "rl/ratio_max": float(most[0]),
            "rl/trained_tokens": total["tokens"],
            **{f"rl/{name}": total[name] / tokens for name in self.spec.loss.metrics},
        }
        if self.spec.kl != "none":  # that of a reward is known of the rollout
            found["rl/kl"] = total["kl"] / tokens
        if self.config.steps_of_a_rollout > 1:  # until then both are one policy
            found["rl/old_kl"] = total["old_kl"] / tokens
        gap_tokens = float(sums[-1])
        if gap_tokens:
            found |= {
                "rl/logprob_gap": float(sums[len(names)]) / gap_tokens,
                "rl/logprob_gap_max": float(most[1]),
                "rl/logprob_gap_kl": float(sums[len(names) + 1]) / gap_tokens,
            }
        return found


def _less_divergence(rollout: Rollout, policy: PolicyConfig) -> Rollout:
    """Advantages of what is left of each reward when the sample's divergence is taken off it."""
    away = log_ratios(rollout.completions)
    rewards = rollout.rewards - policy.kl_coefficient * away.reshape(rollout.rewards.shape)
    tokens = rollout.completions.written.sum()
    return replace(
        rollout,
        advantages=sample_advantages(policy, rewards).reshape(-1),
        metrics={**rollout.metrics, "rl/kl": float(away.sum() / tokens)},
    )


def _advantages_of(rollout: Rollout, sequences: Tensor) -> Tensor:
    """Of these sequences, or of each of their tokens: as the rollout has them."""
    if len(rollout.advantages) == rollout.sequences:
        return rollout.advantages[sequences]
    return rollout.advantages[places_of(rollout.completions.lengths, sequences)]
