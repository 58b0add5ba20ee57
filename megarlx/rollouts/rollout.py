"""A rollout: prompts or tasks drawn, episodes played by the policy as it is, and compared.

Every rank of a group plays its share of the prompts; then all of them hold all of it, in the order
in which the prompts were drawn, so that nothing below depends on the layout.

Letters: P prompts or tasks, n episodes of each, N of them that have tokens, T their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Group
from megarlx.config.objectives import RlConfig
from megarlx.data.prompts import Drawn, PromptData
from megarlx.data.tokenizer import Tokenizer
from megarlx.generation.requests import SamplingSettings
from megarlx.rollouts.advantages import compares_turns, sample_advantages, uninformative
from megarlx.rollouts.bank import Bank, banked
from megarlx.rollouts.completions import Completions, overlong_penalty
from megarlx.rollouts.environments.process import BrokenEnvironment
from megarlx.rollouts.episodes import Episode, EpisodeBatch
from megarlx.rollouts.player import Player, Start, starts_of
from megarlx.rollouts.shown import advantages_of

SOURCE_SHOWN = 40  # characters of a source's name in a metric's
COUNTED = ("rl/reward_failures", "rl/environment_failures")  # begin metrics that are sums


@dataclass(frozen=True)
class Example:
    """An episode for people to read, and where it stands in a rollout."""

    shown: dict[str, Any]
    number: int  # of its prompt
    place: int  # among the prompt's samples


@dataclass(frozen=True)
class Rollout:
    completions: Completions
    rewards: Tensor  # fp64 [P, n], NaN where not known
    advantages: Tensor  # fp64 [N], or [T] where the turns of a sequence differ
    groups: Tensor  # int64 [N], which of the P prompts; in ascending order
    kept: dict[tuple[int, int], int]  # (number of a prompt, place among its samples) -> row of N
    metrics: dict[str, float]
    examples: list[Example]  # of the first prompts of this rank, for people to read

    @property
    def sequences(self) -> int:
        return len(self.completions.lengths)

    def shown(self) -> list[dict[str, Any]]:
        """The examples, with their advantages where they are trained on."""
        return [self._with_advantage(one) for one in self.examples]

    def _with_advantage(self, example: Example) -> dict[str, Any]:
        row = self.kept.get((example.number, example.place))
        if row is None:
            return example.shown
        if len(self.advantages) == self.sequences:
            return advantages_of(example.shown, self.advantages[row : row + 1])
        begin, end = self.completions.offsets[row : row + 2].tolist()
        written = self.completions.written[begin:end]
        return advantages_of(example.shown, self.advantages[begin:end][written])


class RolloutSource(Protocol):
    """What makes rollouts."""

    prompts: PromptData
    seed: int
    group: Group  # shares out the prompts
    waited_seconds: float  # for others of the group, until somebody sets it back

    def rollout(self, steps_done: int = 0) -> Rollout: ...

    def close(self) -> None: ...


def with_signal(
    config: RlConfig, steps_done: int, make: Callable[[int], EpisodeBatch]
) -> tuple[EpisodeBatch, EpisodeBatch, int]:
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
    used = EpisodeBatch.joined(kept)
    if not len(used.rewards):  # a step needs something: as it would be without dropping
        used = parts[0]
    return EpisodeBatch.joined(parts), used, len(parts)


def _informative(groups: EpisodeBatch) -> EpisodeBatch:
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

    def most(self, key: str, value: float) -> None:
        self[key] = (max(value, self.get(key, (value, 1.0))[0]), 1.0)

    def means(self, group: Group) -> dict[str, float]:
        """Times and the like (perf/…) are the most of any rank, counts of failures are sums."""
        every = gather_values({k: list(v) for k, v in self.items()}, group)
        found: dict[str, float] = {}
        for key in dict.fromkeys(key for of_rank in every for key in of_rank):
            pairs = [of_rank.get(key, [0.0, 0.0]) for of_rank in every]
            if key.startswith("perf/"):
                found[key] = max(total for total, _ in pairs)
            elif key.startswith(COUNTED):
                found[key] = sum(total for total, _ in pairs)
            else:
                number = sum(number for _, number in pairs)
                found[key] = sum(total for total, _ in pairs) / number if number else 0.0
        return found


class Sampler:
    """Draws prompts or tasks and plays each of them samples_per_prompt times."""

    def __init__(
        self,
        config: RlConfig,
        player: Player,
        prompts: PromptData,
        group: Group,
        seed: int,
        bank: Bank | None = None,
    ) -> None:
        """`group` shares out the prompts; `bank`, given where a copy of the model has its first
        rank, keeps the samples."""
        self.bank = bank
        self.config, self.player, self.prompts = config, player, prompts
        self.group, self.seed = group, seed
        self.waited_seconds = 0.0
        self.sampling = sampling_of(config, player.tokenizer)

    def rollout(self, steps_done: int = 0) -> Rollout:
        sums, examples = Sums(), list[Example]()
        self._samples: list[dict[str, Any]] = []
        sampled, used, rounds = with_signal(
            self.config, steps_done, lambda count: self._played(count, sums, examples)
        )
        if self.bank is not None and self.group.is_first:
            self.bank.add(steps_done, self._samples)
        used = _with_tokens(used)
        return Rollout(
            used.completions,
            used.rewards,
            self._advantages(used),
            used.groups,
            _kept(used),
            self._metrics(sampled, used, sums, rounds),
            examples,
        )

    def close(self) -> None:
        self.player.close()

    def _played(self, count: int, sums: Sums, examples: list[Example]) -> EpisodeBatch:
        """`count` new prompts on all ranks."""
        n, group, player = self.config.samples_per_prompt, self.group, self.player
        drawn = self.prompts.take(count)
        starts = starts_of(drawn[group.rank :: group.size], n, self.seed)
        episodes = player.play(starts, self.sampling, self.seed, group)
        self._learn_difficulty(drawn, episodes)
        self._keep(episodes)
        self.waited_seconds += player.waited_seconds
        sums.add("perf/generate_seconds", player.seconds, 1)
        sums.add("perf/reward_seconds", player.reward_seconds, 1)
        for name, value in player.generator().metrics().items():
            sums.most(f"perf/{name}", value)
        for key, (total, number) in player.game.metrics(episodes).items():
            sums.add(key, total, number)
        for key, (total, number) in _by_source(starts, episodes, player).items():
            sums.add(key, total, number)
        if self.config.policy.overlong == "penalty":
            episodes = self._shorter_is_better(episodes)
        examples += [
            Example(player.example(one), one.group, one.sequence_id - one.group * n)
            for one in episodes[: 2 * n]
        ]
        batch = EpisodeBatch.of(
            episodes,
            player.game.invalid_action_penalty,
            per_task=n,
            device=player.generator().device,
        )
        return batch.gathered(group)

    def _keep(self, episodes: Sequence[Episode]) -> None:
        """What the bank will hold of them, on its rank, in the order in which they were drawn."""
        if (bank := self.bank) is None:
            return
        mine = [(one.sequence_id, banked(one, tokens=bank.config.tokens)) for one in episodes]
        every = [one for part in gather_values(mine, self.group) for one in part]
        self._samples += [line for _, line in sorted(every, key=lambda one: one[0])]

    def _learn_difficulty(self, drawn: Sequence[Drawn], episodes: Sequence[Episode]) -> None:
        """How often each prompt was solved, told by the rank that played it to all."""
        difficulty = self.prompts.difficulty
        if difficulty is None:
            return
        mine: dict[str, list[bool]] = {}
        for episode in episodes:
            if episode.failure is None:
                mine.setdefault(str(episode.group), []).append(episode.success)
        known = {k: v for part in gather_values(mine, self.group) for k, v in part.items()}
        difficulty.learn(
            (one.place, sum(found) / len(found))
            for one in drawn
            if (found := known.get(str(one.number)))
        )

    def _shorter_is_better(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Episodes of one turn, less the penalty for those that nearly reach the limit."""
        config = self.config
        written = [float(e.trajectory.written.sum()) for e in episodes if e.trajectory is not None]
        off = overlong_penalty(
            torch.tensor(written, dtype=torch.float64),
            config.max_completion_tokens,
            config.policy.overlong_buffer,
        ).tolist()
        return [
            replace(episode, turns=(replace(turn, reward=turn.reward + penalty),))
            for episode, penalty in zip(episodes, off, strict=True)
            for turn in episode.turns
        ]

    def _advantages(self, used: EpisodeBatch) -> Tensor:
        policy = self.config.policy
        if compares_turns(policy):
            return used.token_advantages(policy)
        return sample_advantages(policy, used.rewards).flatten()[used.kept]

    def _metrics(
        self, sampled: EpisodeBatch, used: EpisodeBatch, sums: Sums, rounds: int
    ) -> dict[str, float]:
        made, n = sampled.completions, sampled.rewards.shape[1]
        written = torch.segment_reduce(made.written.double(), "sum", lengths=made.lengths)
        # Episodes of a task share the tokens before their first answer.
        earlier = (written.cumsum(0) - written).repeat_interleave(made.lengths)
        alike = (made.written.cumsum(0) == earlier).sum().double()
        read = len(made.tokens) - written.sum() - alike + alike / n
        known = sampled.rewards[sampled.rewards.isfinite()]
        spread = {"rl/reward_std": float(known.std(correction=0))} if len(known) else {}
        return (
            sums.means(self.group)
            | spread
            | {
                "rl/response_length": float(written.mean()),
                "rl/response_length_min": float(written.min()),
                "rl/response_length_max": float(written.max()),
                "rl/informative_groups": 1 - float(uninformative(sampled.rewards).double().mean()),
                "rl/sampling_rounds": float(rounds),
                "rl/groups_used": float(len(used.numbers)),
                "rl/generated_tokens": float(written.sum()),
                "rl/prompt_tokens": float(read),
            }
        )


def _by_source(
    starts: Sequence[Start], episodes: Sequence[Episode], player: Player
) -> dict[str, tuple[float, float]]:
    """(sum, count) of the known rewards of each source that prompts name."""
    sources = {one.group: one.prompt.metadata.get("source") for one in starts}
    found: dict[str, tuple[float, float]] = {}
    for episode in episodes:
        source = sources[episode.group]
        reward = episode.known_reward(player.game.invalid_action_penalty)
        if isinstance(source, str) and reward is not None:
            key = f"rl/reward_of_{source.replace('/', '_')[:SOURCE_SHOWN]}"
            total, number = found.get(key, (0.0, 0.0))
            found[key] = (total + reward, number + 1)
    return found


def _kept(batch: EpisodeBatch) -> dict[tuple[int, int], int]:
    n = batch.rewards.shape[1]
    places = (divmod(place, n) for place in batch.kept.tolist())
    return {(batch.numbers[task], sample): row for row, (task, sample) in enumerate(places)}


def _with_tokens(batch: EpisodeBatch) -> EpisodeBatch:
    """Without tasks of which no episode has begun: there is nothing to learn from them."""
    begun = sorted(set(batch.groups.tolist()))
    if not begun:
        raise BrokenEnvironment("rl: no episode of any task has begun")
    return batch if len(begun) == len(batch.numbers) else batch.chosen(begun)
