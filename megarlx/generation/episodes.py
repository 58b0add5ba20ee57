"""Sequences of several turns: what ends a turn does not end the sequence.

When a turn is over its tokens go to a callback, which answers with an observation or with the end.
The sequence keeps its slot and its cache: the observation is put behind what the slot holds, and
the next turn is drawn. So over a whole episode every token is computed once, and while a sequence
waits for nothing its slot decodes.

Short observations go through the decode steps of the others, a token a step, in place of a drawn
one; longer ones are prefilled behind the turn. Which of the two depends on the observation's own
length and place alone, so neighbours cannot change a sample (engine.py says why nothing else can).

Only one rank of a copy of the model calls the callback; the others are sent its answers, along the
tensor-parallel group and then with the pipeline's messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megarlx.comm.collectives import broadcast_
from megarlx.generation import rows as decoding
from megarlx.generation.engine import Engine, _Run
from megarlx.generation.requests import FinishReason, Request, SamplingSettings
from megarlx.generation.ring import Item
from megarlx.generation.scheduler import Admission, Finished, Scheduler
from megarlx.generation.stop import StopStrings
from megarlx.model.documents import padded_length

NOT_WRITTEN = -1  # a token that no turn wrote: of the prompt or an observation


@dataclass(frozen=True)
class TurnEnd:
    """A turn that is over, and what an observation may still take."""

    sequence_id: int
    turn: int  # the first is 0
    tokens: list[int]  # what was drawn, with what ended it
    reason: FinishReason  # "length": cut off by the turn's or the sequence's limit
    room: int  # most tokens of an observation that leave place for an answer


# One answer for each: the ids to go on behind, or None where the episode is over.
OnTurnsEnd = Callable[[list[TurnEnd]], Sequence[Sequence[int] | None]]


@dataclass(frozen=True)
class Trajectory:
    """All tokens of an episode, the prompt first. Log-probs are 0 where nothing was drawn."""

    request: Request
    sequence_id: int
    tokens: Tensor  # int64 [n]
    turn: Tensor  # int64 [n], which turn wrote it, or NOT_WRITTEN
    logprobs: Tensor  # fp32 [n], as in Completion
    sampled_logprobs: Tensor  # fp32 [n]
    reasons: tuple[FinishReason, ...]  # how each turn ended
    full: bool  # over because the next observation left no place for an answer

    @property
    def written(self) -> Tensor:
        return self.turn != NOT_WRITTEN


def generate_episodes(
    engine: Engine,
    requests: Sequence[Request],
    sampling: SamplingSettings,
    seed: int,
    on_turns_end: OnTurnsEnd,
    *,
    max_tokens: int | None = None,
    feed_up_to: int | None = None,
) -> list[Trajectory]:
    """One trajectory for each sequence id of each request, in that order.

    A request's `max_new_tokens` are those of one turn. All ranks of a copy of the model call this
    together; only its first one needs the callback. Turns that end in the same step are asked
    about in one call, and nothing is decoded until it returns.

    max_tokens   of a whole episode, the prompt included; by default the engine's `longest`
    feed_up_to   observations of so many tokens go through decode steps, longer ones are prefilled;
                 by default 32 on a CPU, where a decode step costs by the row, and 4 elsewhere
    """
    most = engine.longest if max_tokens is None else max_tokens
    if not 2 <= most <= engine.longest:
        raise ValueError(
            f"generate: max_tokens of an episode is {most}; allowed: 2 to {engine.longest}, the "
            "engine's longest sequence"
        )
    if feed_up_to is None:
        feed_up_to = 32 if engine.device.type == "cpu" else 4
    run = _EpisodeRun(engine, requests, sampling, seed, on_turns_end, most, feed_up_to)
    for _ in run.finished():
        pass
    return run.trajectories()


@dataclass
class _Progress:
    """A sequence between its first and its last turn."""

    begin: int  # of the turn under way
    spans: list[tuple[int, int]]  # of the turns that are over
    reasons: list[FinishReason]
    pending: list[int]  # tokens of an observation still to be fed, the last one first
    full: bool = False


class _EpisodeScheduler(Scheduler):
    """A finished turn asks; its row goes on, or is given to the next sequence."""

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        stop_strings: StopStrings,
        *,
        rows: Sequence[decoding.Rows],
        slots: Sequence[range],
        tokens: np.ndarray,  # [slots, places], what each slot holds behind its prompt
        observe: Callable[[list[TurnEnd]], Sequence[Sequence[int] | None]],
        max_tokens: int,
        feed_up_to: int,
    ) -> None:
        super().__init__(requests, sampling, stop_strings, rows=rows, slots=slots)
        self.tokens, self.observe = tokens, observe
        self.max_tokens, self.feed_up_to = max_tokens, feed_up_to
        self.progress: dict[int, _Progress] = {}  # by the sequence's index
        self.tokens_observed = 0

    def _start(self, rows: decoding.Rows, row: int, slot: int, admission: Admission) -> None:
        super()._start(rows, row, slot, admission)
        sequence = rows.sequences[row]
        self.progress[sequence.index] = _Progress(len(sequence.request.prompt), [], [], [])
        self._limit(rows, row)

    def replaced(self, group: int, drawn: np.ndarray) -> np.ndarray:
        """The drawn tokens, with those of observations where a row is being fed one."""
        tokens, rows = drawn.copy(), self.rows[group]
        self._given = np.zeros(rows.live, dtype=bool)
        for row, sequence in enumerate(rows.sequences):
            pending = self.progress[sequence.index].pending
            if pending:
                tokens[row], self._given[row] = pending.pop(), True
        return tokens

    def advance(self, group: int, tokens: np.ndarray) -> tuple[list[Finished], Admission]:
        rows = self.rows[group]
        ended = self._ended(rows, tokens, self._given)
        answers = self.observe([self._turn_end(done) for _, done in ended]) if ended else []
        finished, admission = [], Admission()
        for (row, done), answer in zip(ended, answers, strict=True):
            if answer is not None and self._go_on(rows, row, done, answer, admission):
                continue
            finished.append(done)
            self._replace(rows, row, done.slot, admission)
        rows.upload()
        return finished, admission

    def _turn_end(self, done: Finished) -> TurnEnd:
        progress = self.progress[done.sequence.index]
        progress.spans.append((progress.begin, done.length))
        progress.reasons.append(done.reason)
        self._text.pop(done.sequence.index, None)  # a stop string lies within one turn
        return TurnEnd(
            done.sequence.sequence_id,
            len(progress.spans) - 1,
            self.tokens[done.slot, progress.begin : done.length].tolist(),
            done.reason,
            max(self.max_tokens - done.length - 1, 0),
        )

    def _go_on(
        self,
        rows: decoding.Rows,
        row: int,
        done: Finished,
        observation: Sequence[int],
        admission: Admission,
    ) -> bool:
        """The turn's last token has not been through the model yet, and the observation's last is
        the next step's input: as many tokens are prefilled as the observation has."""
        progress, count = self.progress[done.sequence.index], len(observation)
        if done.length + count >= self.max_tokens:
            progress.full = True
            return False
        progress.begin = done.length + count
        self.tokens_observed += count
        held, places = done.length - 1, self.tokens.shape[1] - 1
        if count <= self.feed_up_to or held + padded_length(count) > places:
            progress.pending = list(observation)[::-1]
        else:
            last = int(rows.host_tokens[row])
            admission.continued[done.slot] = (held, [last, *observation[:-1]])
            self.tokens[done.slot, done.length : progress.begin] = observation
            rows.host_tokens[row] = observation[-1]
            rows.host_positions[row] += count
            rows.host_keys[row, 1] += count
        self._limit(rows, row)
        return True

    def _limit(self, rows: decoding.Rows, row: int) -> None:
        sequence = rows.sequences[row]
        end = self.progress[sequence.index].begin + sequence.request.max_new_tokens
        rows.last_positions[row] = min(end, self.max_tokens) - 1


class _EpisodeRun(_Run):
    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        seed: int,
        on_turns_end: OnTurnsEnd,
        max_tokens: int,
        feed_up_to: int,
    ) -> None:
        self.on_turns_end = on_turns_end
        self.max_tokens, self.feed_up_to = max_tokens, feed_up_to
        self.ready: dict[int, Trajectory] = {}
        for index, request in enumerate(requests):
            if len(request.prompt) >= max_tokens:
                raise ValueError(
                    f"generate: request {index}: the prompt has {len(request.prompt)} tokens; "
                    f"allowed: 1 to {max_tokens - 1}, below max_tokens of an episode"
                )
        super().__init__(engine, requests, sampling, seed)

    def _scheduler(
        self, requests: Sequence[Request], sampling: SamplingSettings
    ) -> _EpisodeScheduler:
        engine = self.engine
        self.episodes = _EpisodeScheduler(
            requests,
            sampling,
            StopStrings(sampling.stop_strings, engine.detokenize),
            rows=engine.rows,
            slots=engine.slots,
            tokens=engine._tokens,
            observe=self._observe,
            max_tokens=self.max_tokens,
            feed_up_to=self.feed_up_to,
        )
        return self.episodes

    def _begin_step(self, item: Item) -> None:
        super()._begin_step(item)
        self.engine.counts.tokens_observed = self.episodes.tokens_observed

    def _tokens_of_last_step(self, group: int) -> np.ndarray:
        return self.episodes.replaced(group, super()._tokens_of_last_step(group))

    def _observe(self, turns: list[TurnEnd]) -> Sequence[Sequence[int] | None]:
        """Of the rank that asks; every other one is sent the same."""
        mesh, device = self.engine.mesh, self.engine.device
        answers: Sequence[Sequence[int] | None] | None = None
        if self.rank == 0 and mesh.tp.rank == 0:
            answers = self._asked(turns)
            if self.ranks == mesh.tp.size == 1:
                return answers
        # [length of each, -1 for None], then their tokens
        lengths = torch.zeros(len(turns), dtype=torch.int64, device=device)
        if answers is not None:
            known = [-1 if answer is None else len(answer) for answer in answers]
            lengths.copy_(torch.tensor(known))
        self._pass_on(lengths)
        flat = torch.zeros(int(lengths.clamp_min(0).sum()), dtype=torch.int64, device=device)
        if answers is not None:
            flat.copy_(torch.tensor([i for a in answers if a is not None for i in a]))
        if len(flat):
            self._pass_on(flat)
        parts = iter(flat.tolist())
        return [
            None if length < 0 else [next(parts) for _ in range(length)]
            for length in lengths.tolist()
        ]

    def _pass_on(self, tensor: Tensor) -> None:
        """From the first stage's ranks to the next stage's, and so on to the last."""
        if self.rank == 0:
            broadcast_(tensor, self.engine.mesh.tp, source=0)
        else:
            self.ring.receive_(tensor)
        if self.rank + 1 < self.ranks:
            self.ring.outgoing.append(tensor)

    def _asked(self, turns: list[TurnEnd]) -> Sequence[Sequence[int] | None]:
        answers = self.on_turns_end(turns)
        if len(answers) != len(turns):
            raise ValueError(
                f"generate: on_turns_end answered {len(answers)} of {len(turns)} turns; needed: "
                "ids or None for each"
            )
        vocab_size = self.engine.config.vocab_size
        for turn, answer in zip(turns, answers, strict=True):
            if answer is None:
                continue
            wrong = [token for token in answer if not 0 <= token < vocab_size]
            if wrong or len(answer) == 0:
                what = f"holds token id {wrong[0]}" if wrong else "has 0 tokens"
                raise ValueError(
                    f"generate: the observation behind turn {turn.turn} of sequence "
                    f"{turn.sequence_id} {what}; allowed: 1 id or more, of 0 to {vocab_size - 1}"
                )
        return answers

    def _keep(self, finished: list[Finished]) -> None:
        """Trajectories of finished sequences, before their slots are used again."""
        engine = self.engine
        with torch.inference_mode(False):  # so that their tensors may be trained on
            for done in finished:
                progress = self.episodes.progress.pop(done.sequence.index)
                turn = torch.full((done.length,), NOT_WRITTEN)
                for number, (begin, end) in enumerate(progress.spans):
                    turn[begin:end] = number
                logprobs = engine._logprobs[:, done.slot, : done.length].cpu()
                logprobs = logprobs.where(turn != NOT_WRITTEN, 0)
                prompt = list(done.sequence.request.prompt)
                behind = engine._tokens[done.slot, len(prompt) : done.length]
                self.ready[done.sequence.index] = Trajectory(
                    done.sequence.request,
                    done.sequence.sequence_id,
                    torch.tensor([*prompt, *behind.tolist()]),
                    turn,
                    logprobs[0],
                    logprobs[1],
                    tuple(progress.reasons),
                    progress.full,
                )

    def trajectories(self) -> list[Trajectory]:
        return self.with_logprobs([self.ready[index] for index in range(len(self.ready))])
