"""Tasks in an environment: many episodes at once, from their tasks to their records.

The first rank of each copy of the model holds the environment. What it says reaches the others with
the generation (generation/run.py), and before and after it as JSON.

A line of the tasks' file is {"question": the first observation, "task": {…}}; without "task" the
line is the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Group, Mesh
from megarlx.config.environment import EnvironmentConfig
from megarlx.data.conversations import Role, Template
from megarlx.data.conversations import Turn as Said
from megarlx.data.prompts import Prompt
from megarlx.data.tokenizer import Tokenizer, TokenizerError
from megarlx.generation.requests import Request, Trajectory, TurnEnd
from megarlx.rollouts.environments.interface import Task
from megarlx.rollouts.environments.process import (
    Answer,
    BrokenEnvironment,
    EnvironmentPool,
    Failure,
    Outcome,
)
from megarlx.rollouts.episodes import Episode, Turn, metrics_of, stop_if_too_many_failed
from megarlx.rollouts.player import Start, from_first


@dataclass
class _Record:
    """An episode as the environment sees it."""

    seen: str = ""  # the last observation
    turns: list[dict[str, Any]] = field(default_factory=list)
    success: bool = False
    failure: dict[str, str] | None = None


class EnvironmentGame:
    talks = True

    def __init__(
        self, config: EnvironmentConfig, template: Template, tokenizer: Tokenizer, mesh: Mesh
    ) -> None:
        self.config, self.template, self.tokenizer = config, template, tokenizer
        self.model = mesh.model
        self.pool = EnvironmentPool(self.config) if self.model.rank == 0 else None
        self.max_tokens: int | None = config.max_episode_tokens
        self.invalid_action_penalty = config.invalid_action_penalty
        self.records: dict[int, _Record] = {}  # on the first rank, by sequence id
        self.broken = ""  # why no process can be started any more

    def begin(self, starts: Sequence[Start], most_tokens: int) -> list[Request]:
        """Those of a task that begin alike share their prompt."""
        self.records, self.broken = {}, ""
        try:
            prompts = from_first(
                lambda: self._prompts(starts, most_tokens), self.model, BrokenEnvironment
            )
        except BrokenEnvironment as error:  # told to the others when all have played
            self.broken, prompts = str(error), []
        return [
            Request(ids, tuple(sequence_ids), self.config.max_turn_tokens)
            for ids, sequence_ids in prompts
        ]

    def episodes(
        self, starts: Sequence[Start], made: Mapping[int, Trajectory], group: Group
    ) -> list[Episode]:
        """Of all starts, lost ones too."""
        records: list[dict[str, Any]] = []
        try:
            records = from_first(lambda: self._ended(starts), self.model, BrokenEnvironment)
        except BrokenEnvironment as error:
            self.broken = str(error)
        if why := next(filter(None, gather_values(self.broken, group)), ""):
            raise BrokenEnvironment(why)
        every = [(start, sequence_id) for start in starts for sequence_id in start.sequence_ids]
        found = [
            Episode(
                start.group,
                i,
                tuple(Turn(**turn) for turn in record["turns"]),
                record["success"],
                made.get(i),
                None if record["failure"] is None else Failure(**record["failure"]),
            )
            for (start, i), record in zip(every, records, strict=True)
        ]
        stop_if_too_many_failed(self.config, found, group)
        return found

    def metrics(self, episodes: Sequence[Episode]) -> Mapping[str, tuple[float, float]]:
        return metrics_of(episodes, self.config.label, self.invalid_action_penalty)

    def example(self, episode: Episode) -> dict[str, Any]:
        """What was seen first, and then what was done and seen in turn."""
        lines: list[str] = []
        for number, turn in enumerate(episode.turns):
            if number:
                lines.append(f"  saw: {turn.observation}")
            lines.append(f"did: {turn.action}" + ("" if turn.valid else "  (not valid)"))
        return {
            "prompt": episode.turns[0].observation if episode.turns else "",
            "completion": "\n".join(lines),
            "reference": None,
            "reward": episode.known_reward(self.invalid_action_penalty),
            "finish_reason": episode.end,
            "turns": len(episode.turns),
        }

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()

    # On the first rank of each copy of the model.

    def _prompts(
        self, starts: Sequence[Start], most_tokens: int
    ) -> list[tuple[list[int], list[int]]]:
        """(prompt, sequence ids)"""
        assert self.pool is not None
        outcomes = self.pool.reset(
            {i: (task_of(one.prompt), one.seed) for one in starts for i in one.sequence_ids}
        )
        room = most_tokens - self.config.max_turn_tokens
        prompts = []
        for start in starts:
            alike: dict[str, list[int]] = {}
            for sequence_id in start.sequence_ids:
                self.records[sequence_id] = _Record()
                text = self._seen(sequence_id, outcomes[sequence_id])
                if text is not None:
                    alike.setdefault(text, []).append(sequence_id)
            for text, sequence_ids in alike.items():
                ids = self._ids(text, sequence_ids, follows=False)
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

    def answer(self, ends: list[TurnEnd], texts: list[str]) -> list[Sequence[int] | None]:
        assert self.pool is not None
        actions = {end.sequence_id: text for end, text in zip(ends, texts, strict=True)}
        outcomes = self._stepped(self.pool, actions)
        answers: list[Sequence[int] | None]
        answers = [self._answer(end, actions, outcomes[end.sequence_id]) for end in ends]
        over = [e.sequence_id for e, answer in zip(ends, answers, strict=True) if answer is None]
        self.pool.end(over)
        return answers

    def _stepped(self, pool: EnvironmentPool, actions: dict[int, str]) -> dict[int, Outcome]:
        """In the middle of generation other ranks wait: they are told at its end, with `broken`,
        that no process can be started any more."""
        if not self.broken:
            try:
                return pool.step(actions)
            except BrokenEnvironment as error:
                self.broken = str(error)
        return {sequence_id: Failure("not_asked", self.broken) for sequence_id in actions}

    def _answer(self, end: TurnEnd, actions: dict[int, str], outcome: Outcome) -> list[int] | None:
        record = self.records[end.sequence_id]
        turn: dict[str, Any] = {"observation": record.seen, "action": actions[end.sequence_id]}
        record.turns.append(turn)
        text = self._seen(end.sequence_id, outcome)
        if text is None or not isinstance(outcome, Answer):
            return None
        info = dict(outcome.info)
        turn["reward"], turn["valid"] = outcome.reward, bool(info.pop("valid", True))
        role: Role = "tool" if info.pop("role", "user") == "tool" else "user"
        success = info.pop("success", sum(t["reward"] for t in record.turns) > 0)
        turn["info"] = info
        if outcome.done:
            record.success = bool(success)
            return None
        if end.turn + 1 >= self.config.max_turns:
            return None
        ids = self._ids(text, [end.sequence_id], follows=True, role=role)
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

    def _ids(
        self,
        observation: str,
        sequence_ids: list[int],
        *,
        follows: bool,
        role: Role = "user",
    ) -> list[int] | None:
        """As the template writes it, up to where the policy goes on."""
        said = [Said(role, observation)]
        try:
            ids = self.template.prompt_ids(said, self.tokenizer, follows=follows)
        except (TokenizerError, UnicodeEncodeError) as error:
            self._lose(sequence_ids, "not_encodable", str(error))
            return None
        if not ids:
            self._lose(sequence_ids, "not_encodable", f"{observation!r:.80} has no tokens")
            return None
        return ids

    def _lose(self, sequence_ids: Sequence[int], kind: str, detail: str) -> None:
        for sequence_id in sequence_ids:
            self.records[sequence_id].failure = {"kind": kind, "detail": detail}

    def _ended(self, starts: Sequence[Start]) -> list[dict[str, Any]]:
        """Each episode's record, in the order of the starts."""
        assert self.pool is not None
        if self.broken:
            raise BrokenEnvironment(self.broken)
        self.pool.end(self.records)
        records = [self.records[i] for one in starts for i in one.sequence_ids]
        return [
            {"turns": one.turns, "success": one.success, "failure": one.failure} for one in records
        ]


def task_of(prompt: Prompt) -> Task:
    task = prompt.metadata.get("task")
    if isinstance(task, dict):
        return task
    if not prompt.question:
        return dict(prompt.metadata)
    return {"question": prompt.question, "answer": prompt.answer, **prompt.metadata}
