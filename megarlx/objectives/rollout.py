"""A rollout: prompts drawn, answers sampled from the policy as it is, scored, and compared.

Every rank of a group generates and scores its share of the prompts; then all of them hold all of
it, in the order in which the prompts were drawn, so that nothing below depends on the layout.

Letters: P prompts, n samples of each, N = P·n sequences, T tokens of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from megarlx.comm.collectives import barrier, gather_values
from megarlx.comm.groups import Group, Mesh
from megarlx.config.objectives import RlConfig
from megarlx.data.prompts import Drawn, PromptData
from megarlx.data.tokenizer import Tokenizer
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, Request, SamplingSettings
from megarlx.generation.stop import text_of
from megarlx.objectives.advantages import sample_advantages, uninformative
from megarlx.objectives.exchange import gather_completions, gather_ragged
from megarlx.objectives.policy_loss import Completions, overlong_penalty, select
from megarlx.objectives.reward_process import RewardError
from megarlx.objectives.rewards import Rewards
from megarlx.objectives.samples import Sample

SOLVED = 1.0 - 1e-6  # of the first reward: a sample with all of it is a success


@dataclass(frozen=True)
class Rollout:
    completions: Completions
    rewards: Tensor  # fp64 [P, n], NaN where not known
    advantages: Tensor  # fp64 [N], or [T] where the turns of a sequence differ
    groups: Tensor  # int64 [N], which of the P prompts; in ascending order
    metrics: dict[str, float]
    examples: list[dict[str, Any]]  # of the first prompts of this rank, for people to read

    @property
    def sequences(self) -> int:
        return len(self.completions.lengths)


class RolloutSource(Protocol):
    """What makes rollouts: from prompts and rewards (here), or in an environment."""

    prompts: PromptData
    seed: int
    group: Group  # shares out the prompts
    waited_seconds: float  # for others of the group, until somebody sets it back

    def rollout(self, steps_done: int = 0) -> Rollout: ...

    def close(self) -> None: ...


class Groups(Protocol):
    """Samples of prompts with their rewards, as all ranks hold them."""

    @property
    def rewards(self) -> Tensor: ...  # [P, n]

    def chosen(self, which: Sequence[int]) -> Self: ...

    @staticmethod
    def joined(parts: Sequence[Any]) -> Any: ...


G = TypeVar("G", bound=Groups)


def with_signal(config: RlConfig, steps_done: int, make: Callable[[int], G]) -> tuple[G, G, int]:
    """(all that was sampled, what is trained on, the rounds it took).

    With drop_uninformative, and once the cold start is over, more prompts are drawn in the place
    of groups without signal, until there are enough or the rounds are over.
    """
    wanted = config.prompts_per_step * config.steps_per_rollout
    parts = [make(wanted)]
    policy = config.policy
    if not policy.drop_uninformative or steps_done < policy.drop_uninformative_after_steps:
        return parts[0], parts[0], 1
    kept = [_informative(parts[0])]
    for _ in range(config.resampling_rounds):
        missing = wanted - sum(len(part.rewards) for part in kept)
        if missing <= 0:
            break
        parts.append(make(missing))
        kept.append(_informative(parts[-1]))
    used = parts[0].joined(kept)
    if not len(used.rewards):  # a step needs something: as it would be without dropping
        used = parts[0]
    return parts[0].joined(parts), used, len(parts)


def _informative(groups: G) -> G:
    dull = uninformative(groups.rewards).tolist()
    return groups.chosen([i for i, nothing in enumerate(dull) if not nothing])


def sampling_of(config: RlConfig, tokenizer: Tokenizer) -> SamplingSettings:
    return SamplingSettings(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop_tokens=(tokenizer.eos_id,),
        stop_strings=config.stop_strings,
    )


class Sums(dict[str, tuple[float, float]]):
    """Totals and counts of metrics of this rank, until those of all ranks are put together."""

    def add(self, key: str, total: float, number: float) -> None:
        before = self.get(key, (0.0, 0.0))
        self[key] = (before[0] + total, before[1] + number)

    def means(self, group: Group, counted: tuple[str, ...]) -> dict[str, float]:
        """Times (perf/…) are those of the slowest rank, those that begin as `counted` are sums."""
        every = gather_values({k: list(v) for k, v in self.items()}, group)
        found: dict[str, float] = {}
        for key in self:
            pairs = [of_rank.get(key, [0.0, 0.0]) for of_rank in every]
            if key.startswith("perf/"):
                found[key] = max(total for total, _ in pairs)
            elif key.startswith(counted):
                found[key] = sum(total for total, _ in pairs)
            else:
                number = sum(number for _, number in pairs)
                found[key] = sum(total for total, _ in pairs) / number if number else 0.0
        return found


@dataclass
class _Groups:
    """Prompts whose samples all ranks know, by the number of the draw."""

    numbers: list[int]
    completions: Completions
    rewards: Tensor  # [P, n]
    solved: Tensor  # [P, n], of the first reward

    def chosen(self, which: Sequence[int]) -> _Groups:
        """The groups at these places, in this order."""
        n = self.rewards.shape[1]
        index = torch.tensor(which, dtype=torch.int64, device=self.rewards.device)
        rows = (index[:, None] * n + torch.arange(n, device=index.device)).reshape(-1)
        return _Groups(
            [self.numbers[i] for i in which],
            select(self.completions, rows),
            self.rewards[index],
            self.solved[index],
        )

    @staticmethod
    def joined(parts: Sequence[_Groups]) -> _Groups:
        """All of them, in the order in which their prompts were drawn."""
        first = parts[0].completions
        tensors = {
            f.name: torch.cat([getattr(part.completions, f.name) for part in parts])
            for f in fields(first)
            if getattr(first, f.name) is not None
        }
        together = _Groups(
            [number for part in parts for number in part.numbers],
            replace(first, **tensors),
            torch.cat([part.rewards for part in parts]),
            torch.cat([part.solved for part in parts]),
        )
        order = sorted(range(len(together.numbers)), key=lambda i: together.numbers[i])
        return together if order == list(range(len(order))) else together.chosen(order)


class Sampler:
    """Draws prompts, samples from the live weights and scores what came out."""

    def __init__(
        self,
        config: RlConfig,
        engine: Callable[[], Engine],
        prompts: PromptData,
        tokenizer: Tokenizer,
        rewards: Rewards,
        mesh: Mesh,
        seed: int,
    ) -> None:
        self.config, self.engine, self.prompts = config, engine, prompts
        self.tokenizer, self.rewards, self.mesh, self.seed = tokenizer, rewards, mesh, seed
        self.group = mesh.dp  # shares out the prompts
        self.waited_seconds = 0.0
        self.sampling = sampling_of(config, tokenizer)

    def rollout(self, steps_done: int = 0) -> Rollout:
        config, sums = self.config, Sums()
        examples: list[dict[str, Any]] = []
        sampled, used, rounds = with_signal(
            config, steps_done, lambda count: self._groups(count, sums, examples)
        )
        count, n = used.rewards.shape
        return Rollout(
            used.completions,
            used.rewards,
            sample_advantages(config.policy, used.rewards).reshape(-1),
            torch.arange(count, device=used.rewards.device).repeat_interleave(n),
            self._metrics(sampled, used, sums, rounds),
            examples,
        )

    def close(self) -> None:
        self.rewards.close()

    def _groups(self, count: int, sums: Sums, examples: list[dict[str, Any]]) -> _Groups:
        """`count` new prompts, sampled and scored, on all ranks."""
        config, group = self.config, self.group
        n = config.samples_per_prompt
        drawn = self.prompts.take(count)
        mine = drawn[group.rank :: group.size]
        requests = [
            Request(
                one.ids,
                tuple(range(one.number * n, (one.number + 1) * n)),
                config.max_completion_tokens,
            )
            for one in mine
        ]
        begun = time.perf_counter()
        found = self.engine().generate(requests, self.sampling, self.seed)
        generated = time.perf_counter()
        barrier(group)
        met = time.perf_counter()
        self.waited_seconds += met - generated
        samples = [self.sample_of(mine[i // n], completion) for i, completion in enumerate(found)]
        scored = self._score(samples)
        rewarded = time.perf_counter()
        sums.add("perf/generate_seconds", generated - begun, 1)
        sums.add("perf/reward_seconds", rewarded - met, 1)
        for key, (total, number) in scored["metrics"].items():
            sums.add(key, total, number)
        totals = torch.tensor(scored["totals"], dtype=torch.float64)
        if config.policy.overlong == "penalty":
            lengths = torch.tensor([float(len(c.tokens)) for c in found], dtype=torch.float64)
            totals = totals + overlong_penalty(
                lengths, config.max_completion_tokens, config.policy.overlong_buffer
            )
        first = torch.tensor(scored["first"], dtype=torch.float64)
        examples += [
            {
                "prompt": sample.prompt,
                "completion": sample.completion,
                "reference": sample.reference,
                "reward": total,
                "finish_reason": sample.finish_reason,
            }
            for sample, total in list(zip(samples, totals.tolist(), strict=True))[: 2 * n]
        ]
        return self._gathered(mine, found, totals, first)

    def _score(self, samples: list[Sample]) -> dict[str, Any]:
        """By one rank of each copy of the model: a reward need not say the same thing twice."""
        said: dict[str, Any] = {}
        if self.mesh.model.rank == 0:
            try:
                scored = self.rewards.score(samples, self.group)
                first = next(iter(scored.parts.values()))
                said = {"totals": scored.totals, "first": first, "metrics": scored.metrics()}
            except RewardError as error:
                said = {"error": str(error)}
        said = gather_values(said, self.mesh.model)[0]
        if "error" in said:
            raise RewardError(said["error"])
        return said

    def sample_of(self, drawn: Drawn, completion: Completion) -> Sample:
        tokens = completion.tokens.tolist()
        return Sample(
            prompt=drawn.prompt.question,
            completion=text_of(tokens, self.sampling, self.tokenizer.decode_sampled),
            reference=drawn.prompt.answer,
            metadata=drawn.prompt.metadata,
            finish_reason=completion.finish_reason,
            tokens=len(tokens),
        )

    def _gathered(
        self, mine: Sequence[Drawn], found: Sequence[Completion], totals: Tensor, first: Tensor
    ) -> _Groups:
        n, group = self.config.samples_per_prompt, self.group
        device = self.engine().device
        # Without a filter both are the log-probs of the policy that is trained, at its temperature.
        own = (
            Completions.of(
                [c.request.prompt for c in found],
                [c.tokens.to(device) for c in found],
                rollout_logprobs=[c.sampled_logprobs.to(device) for c in found],
                truncated=[c.finish_reason == "length" for c in found],
            )
            if found
            else _nothing(device)
        )
        completions = gather_completions(own, group)
        table = torch.stack((totals, first), dim=1).reshape(-1, n, 2).to(device)
        table = gather_ragged(table, group)
        numbers = [
            number
            for rank in gather_values([drawn.number for drawn in mine], group)
            for number in rank
        ]
        solved = (table[..., 1] >= SOLVED).double()
        return _Groups.joined([_Groups(numbers, completions, table[..., 0], solved)])

    def _metrics(
        self, sampled: _Groups, used: _Groups, sums: Sums, rounds: int
    ) -> dict[str, float]:
        metrics = sums.means(self.group, ("rl/reward_failures",))
        made = sampled.completions
        lengths = torch.segment_reduce(made.written.double(), "sum", lengths=made.lengths)
        truncated = made.truncated
        assert truncated is not None
        metrics |= {
            "rl/pass_at_1": float(sampled.solved.mean()),
            "rl/response_length": float(lengths.mean()),
            "rl/truncated": float(truncated.double().mean()),
            "rl/informative_groups": 1 - float(uninformative(sampled.rewards).double().mean()),
            "rl/sampling_rounds": float(rounds),
            "rl/groups_used": float(len(used.numbers)),
            "rl/generated_tokens": float(lengths.sum()),
            "rl/prompt_tokens": float(made.lengths.sum() - lengths.sum())
            / sampled.rewards.shape[1],
        }
        return metrics


def _nothing(device: torch.device) -> Completions:
    """Of a rank that had no prompt."""
    ids, flags = (torch.zeros(0, dtype=d, device=device) for d in (torch.int64, torch.bool))
    return Completions(
        ids, ids, flags, rollout_logprobs=torch.zeros(0, device=device), truncated=flags
    )
