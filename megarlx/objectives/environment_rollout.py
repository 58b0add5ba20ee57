"""A policy in an environment: many episodes at once, from their tasks to their records.

The first rank of each copy of the model holds the environment. What it says reaches the others with
the generation (generation/episodes.py), and before and after it as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megarlx.comm.collectives import gather_values
from megarlx.config.environment import EnvironmentConfig
from megarlx.data.conversations import Template
from megarlx.data.conversations import Turn as Said
from megarlx.data.tokenizer import Tokenizer, TokenizerError
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings, TurnEnd
from megarlx.generation.stop import text_of
from megarlx.objectives.environment_process import (
    Answer,
    BrokenEnvironment,
    EnvironmentPool,
    Failure,
    Outcome,
)
from megarlx.objectives.environments.interface import Task
from megarlx.objectives.episodes import Episode, Turn


@dataclass(frozen=True)
class Start:
    """A task, and a sequence id for each episode wanted of it."""

    group: int
    task: Task
    seed: int  # of the environment, the same for all of them
    sequence_ids: tuple[int, ...]


@dataclass
class _Record:
    """An episode as the environment sees it."""

    seen: str = ""  # the last observation
    turns: list[dict[str, Any]] = field(default_factory=list)
    success: bool = False
    failure: dict[str, str] | None = None


class EnvironmentRollout:
    """`pool` is needed on the first rank of each copy of the model only."""

    def __init__(
        self,
        engine: Engine,
        config: EnvironmentConfig,
        pool: EnvironmentPool | None,
        template: Template,
        tokenizer: Tokenizer,
    ) -> None:
        self.engine, self.config, self.pool = engine, config, pool
        self.template, self.tokenizer = template, tokenizer
        self.first = engine.mesh.model.rank == 0
        if self.first and pool is None:
            raise ValueError("rollout: the first rank of a model was given no environment")

    def run(self, starts: Sequence[Start], sampling: SamplingSettings, seed: int) -> list[Episode]:
        """The episodes of all starts in their order, lost ones too."""
        self.sampling = sampling
        self.records: dict[int, _Record] = {}
        self.broken: BrokenEnvironment | None = None
        prompts = self._shared(lambda: self._begin(starts))
        requests = [
            Request(ids, sequence_ids, self.config.max_turn_tokens) for ids, sequence_ids in prompts
        ]
        trajectories = self.engine.episodes(
            requests,
            sampling,
            seed,
            self._on_turns_end,
            max_tokens=min(self.config.max_episode_tokens, self.engine.longest),
        )
        made = {t.sequence_id: t for t in trajectories}
        records: dict[str, Any] = self._shared(self._finished)
        episodes = []
        for start in starts:
            for sequence_id in start.sequence_ids:
                record, failure = records[str(sequence_id)], None
                if record["failure"] is not None:
                    failure = Failure(**record["failure"])
                turns = tuple(Turn(**turn) for turn in record["turns"])
                episodes.append(
                    Episode(
                        start.group,
                        sequence_id,
                        turns,
                        record["success"],
                        made.get(sequence_id),
                        failure,
                    )
                )
        return episodes

    def _begin(self, starts: Sequence[Start]) -> list[tuple[list[int], list[int]]]:
        """(prompt, sequence ids): those of a task that begin alike share their prompt."""
        assert self.pool is not None
        outcomes = self.pool.reset(
            {i: (start.task, start.seed) for start in starts for i in start.sequence_ids}
        )
        room = min(self.config.max_episode_tokens, self.engine.longest)
        room -= self.config.max_turn_tokens
        prompts = []
        for start in starts:
            alike: dict[str, list[int]] = {}
            for sequence_id in start.sequence_ids:
                self.records[sequence_id] = _Record()
                text = self._seen(sequence_id, outcomes[sequence_id])
                if text is not None:
                    alike.setdefault(text, []).append(sequence_id)
            for text, sequence_ids in alike.items():
                ids = self._ids(text, sequence_ids)
                if ids is None:
                    continue
                if len(ids) > room:
                    detail = (
                        f"the first observation has {len(ids)} tokens; max_episode_tokens less "
                        f"max_turn_tokens allows {room}"
                    )
                    self._lose(sequence_ids, "too_long", detail)
                    continue
                prompts.append((ids, sequence_ids))
        return prompts

    def _on_turns_end(self, ends: list[TurnEnd]) -> list[Sequence[int] | None]:
        assert self.pool is not None
        actions = {
            end.sequence_id: text_of(end.tokens, self.sampling, self.tokenizer.decode_sampled)
            for end in ends
        }
        outcomes = self._stepped(self.pool, actions)
        answers: list[Sequence[int] | None]
        answers = [self._answer(end, actions, outcomes[end.sequence_id]) for end in ends]
        over = [e.sequence_id for e, answer in zip(ends, answers, strict=True) if answer is None]
        self.pool.end(over)
        return answers

    def _stepped(self, pool: EnvironmentPool, actions: dict[int, str]) -> dict[int, Outcome]:
        """In the middle of generation other ranks wait: they are told at its end, with `broken`,
        that no process can be started any more."""
        if self.broken is None:
            try:
                return pool.step(actions)
            except BrokenEnvironment as error:
                self.broken = error
        return {sequence_id: Failure("not_asked", str(self.broken)) for sequence_id in actions}

    def _answer(self, end: TurnEnd, actions: dict[int, str], outcome: Outcome) -> list[int] | None:
        record = self.records[end.sequence_id]
        turn: dict[str, Any] = {"observation": record.seen, "action": actions[end.sequence_id]}
        record.turns.append(turn)
        text = self._seen(end.sequence_id, outcome)
        if text is None or not isinstance(outcome, Answer):
            return None
        info = dict(outcome.info)
        turn["reward"], turn["valid"] = outcome.reward, bool(info.pop("valid", True))
        success = info.pop("success", sum(t["reward"] for t in record.turns) > 0)
        turn["info"] = info
        if outcome.done:
            record.success = bool(success)
            return None
        if end.turn + 1 >= self.config.max_turns:
            return None
        ids = self._ids(text, [end.sequence_id])
        if ids is not None and end.tokens[-1] != self.tokenizer.eos_id:
            return [self.tokenizer.eos_id, *ids]  # an answer that was cut off ends as others do
        return ids

    def _seen(self, sequence_id: int, outcome: Outcome) -> str | None:
        record = self.records[sequence_id]
        if isinstance(outcome, Failure):
            self._lose([sequence_id], outcome.kind, outcome.detail)
            return None
        record.seen = outcome.observation
        return record.seen

    def _ids(self, observation: str, sequence_ids: list[int]) -> list[int] | None:
        """As the template writes it, up to where the policy goes on."""
        try:
            return self.template.prompt_ids([Said("user", observation)], self.tokenizer)
        except (TokenizerError, UnicodeEncodeError) as error:
            self._lose(sequence_ids, "not_encodable", str(error))
            return None

    def _lose(self, sequence_ids: Sequence[int], kind: str, detail: str) -> None:
        for sequence_id in sequence_ids:
            self.records[sequence_id].failure = {"kind": kind, "detail": detail}

    def _finished(self) -> dict[str, dict[str, Any]]:
        assert self.pool is not None
        if self.broken is not None:
            raise self.broken
        self.pool.end(self.records)
        return {
            str(sequence_id): {
                "turns": record.turns,
                "success": record.success,
                "failure": record.failure,
            }
            for sequence_id, record in self.records.items()
        }

    def _shared(self, make: Callable[[], Any]) -> Any:
        """What the first rank makes, on all ranks; and what stops it stops all of them."""
        shared: dict[str, Any] = {}
        if self.first:
            try:
                shared = {"made": make()}
            except BrokenEnvironment as error:
                shared = {"broken": str(error)}
        shared = gather_values(shared, self.engine.mesh.model)[0]
        if "broken" in shared:
            raise BrokenEnvironment(shared["broken"])
        return shared["made"]
