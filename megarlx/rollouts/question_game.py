"""Questions with one answer each, which rewards score when all are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarlx.comm.groups import Group, Mesh
from megarlx.generation.requests import Request, Trajectory, TurnEnd
from megarlx.rollouts.episodes import Episode, Turn
from megarlx.rollouts.player import Start, from_first
from megarlx.rollouts.rewards.process import RewardError
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rewards.sample import Sample

FORM = "form"  # in a turn's info: what the form of its answer is worth
PARTS = "rewards"  # in a turn's info: each reward by its name, unweighted
SOLVED = 1.0 - 1e-6  # of the first reward: an answer with all of it is a success


class QuestionGame:
    """`rewards` are needed on the first rank of each copy of the model only; so is `form`, which
    is no part of an episode's reward."""

    talks = False
    max_tokens: int | None = None
    invalid_action_penalty = 0.0

    def __init__(
        self,
        rewards: Rewards | None,
        max_new_tokens: int,
        mesh: Mesh,
        form: Rewards | None = None,
    ) -> None:
        self.form = form
        self.rewards, self.max_new_tokens, self.model = rewards, max_new_tokens, mesh.model
        self._said: dict[int, str] = {}
        self._of_rewards: dict[str, tuple[float, float]] = {}

    def begin(self, starts: Sequence[Start], most_tokens: int) -> list[Request]:
        return [Request(one.ids, one.sequence_ids, self.max_new_tokens) for one in starts]

    def answer(self, ends: list[TurnEnd], texts: list[str]) -> list[Sequence[int] | None]:
        self._said = {end.sequence_id: text for end, text in zip(ends, texts, strict=True)}
        return [None] * len(ends)

    def episodes(
        self, starts: Sequence[Start], made: Mapping[int, Trajectory], group: Group
    ) -> list[Episode]:
        """One rank of each copy of the model scores: a reward need not say the same thing twice."""
        every = [(start, sequence_id) for start in starts for sequence_id in start.sequence_ids]

        def score() -> dict[str, Any]:
            assert self.rewards is not None
            samples = [self._sample(start, made[i]) for start, i in every]
            scored = self.rewards.score(samples, group)
            first = next(iter(scored.parts.values()))
            infos: list[dict[str, Any]] = [
                {PARTS: {name: values[at] for name, values in scored.parts.items()}}
                for at in range(len(samples))
            ]
            if self.form is not None:
                for info, value in zip(infos, self.form.score(samples, group).totals, strict=True):
                    info[FORM] = value
            return {
                "totals": scored.totals,
                "first": first,
                "infos": infos,
                "metrics": scored.metrics(),
            }

        scored = from_first(score, self.model, RewardError)
        self._of_rewards = scored["metrics"]
        return [
            Episode(
                start.group,
                i,
                (Turn(start.prompt.question, self._said[i], total, info=info),),
                first >= SOLVED,
                made[i],
                reference=start.prompt.answer,
            )
            for (start, i), total, first, info in zip(
                every, scored["totals"], scored["first"], scored["infos"], strict=True
            )
        ]

    def _sample(self, start: Start, made: Trajectory) -> Sample:
        return Sample(
            prompt=start.prompt.question,
            completion=self._said[made.sequence_id],
            reference=start.prompt.answer,
            metadata=start.prompt.metadata,
            finish_reason=made.reasons[0],
            tokens=int(made.written.sum()),
        )

    def metrics(self, episodes: Sequence[Episode]) -> dict[str, tuple[float, float]]:
        count = len(episodes)
        return self._of_rewards | {
            "rl/pass_at_1": (sum(one.success for one in episodes), count),
            "rl/truncated": (sum(one.truncated for one in episodes), count),
        }

    def example(self, episode: Episode) -> dict[str, Any]:
        (turn,), made = episode.turns, episode.trajectory
        assert made is not None
        return {
            "prompt": turn.observation,
            "completion": turn.action,
            "reference": episode.reference,
            "reward": episode.known_reward(),
            "finish_reason": made.reasons[0],
        }

    def close(self) -> None:
        for rewards in (self.rewards, self.form):
            if rewards is not None:
                rewards.close()


class Unscored(QuestionGame):
    """Questions whose answers nobody scores."""

    def __init__(self, max_new_tokens: int, mesh: Mesh) -> None:
        super().__init__(None, max_new_tokens, mesh)

    def episodes(
        self, starts: Sequence[Start], made: Mapping[int, Trajectory], group: Group
    ) -> list[Episode]:
        return [
            Episode(start.group, i, (Turn(start.prompt.question, self._said[i]),), False, made[i])
            for start in starts
            for i in start.sequence_ids
        ]
