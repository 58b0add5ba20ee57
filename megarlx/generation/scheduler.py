"""Which sequence decodes in which slot, from the first prompt to the last token.

Its decisions follow from the requests, the tokens and the observations alone, so every rank of a
pipeline keeps one and all agree without a word about it.

Samples start in the order of the requests, each as soon as a slot and pages for it are free
(pages.py). A prompt's pages are held until the last of its samples is over, so it is computed once
for all of them, however few slots there are.

What ends a turn does not end its sequence. The turns that ended are told to `observe`, which
answers with an observation or with the end. The sequence keeps its slot and its cache: the
observation is put behind what the slot holds, and the next turn is drawn. So over a whole episode
every token is computed once. Without `observe` every sequence ends with its first turn.

Short observations go through the decode steps of the others, a token a step, in place of a drawn
one; longer ones are prefilled behind the turn. Which of the two depends on the observation's own
length and place alone, so neighbours cannot change a sample (engine.py says why nothing else can).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import numpy as np

from megarlx.generation import rows as decoding
from megarlx.generation.pages import Pages
from megarlx.generation.requests import FinishReason, Request, SamplingSettings, TurnEnd
from megarlx.generation.stop import StopStrings
from megarlx.model.documents import padded_length

Observe = Callable[[list[TurnEnd]], ListLike[ListLike[int] | None]]


@dataclass
class Admission:
    """What has to be put into the cache before the next step."""

    prefills: dict[int, ListLike[int]] = field(default_factory=dict)  # slot -> tokens
    # slot -> (tokens it holds, tokens behind them): a sequence that goes on after an observation
    continued: dict[int, tuple[int, ListLike[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A turn that is over, and maybe its sequence."""

    sequence: decoding.Sequence
    slot: int
    length: int  # up to its last token
    reason: FinishReason


@dataclass
class Turns:
    """Of a sequence."""

    begin: int  # of the turn under way
    spans: list[tuple[int, int]] = field(default_factory=list)  # of those that are over
    reasons: list[FinishReason] = field(default_factory=list)
    full: bool = False  # the next observation left no place for an answer


class Scheduler:
    """`groups` sets of rows take turns (one where there is no pipeline) and share one queue."""

    def __init__(
        self,
        requests: ListLike[Request],
        sampling: SamplingSettings,
        stop_strings: StopStrings,
        *,
        rows: ListLike[decoding.Rows],
        slots: ListLike[range],  # of each group
        pages: Pages,
        tokens: np.ndarray,  # [slots, places], what each slot holds behind its prompt
        observe: Observe | None,
        max_tokens: int,  # of a sequence
        feed_up_to: int,  # tokens of an observation; longer ones are prefilled
    ) -> None:
        samples = [(i, r, s) for i, r in enumerate(requests) for s in r.sequence_ids]
        self.queue = deque(
            decoding.Sequence(index, i, request, sequence_id)
            for index, (i, request, sequence_id) in enumerate(samples)
        )
        self.stop_tokens = np.array(sampling.stop_tokens, dtype=np.int64)
        self.stop_strings = stop_strings
        self.rows, self.pages, self.tokens = rows, pages, tokens
        self._free = [list(of_group)[::-1] for of_group in slots]
        self.observe, self.max_tokens, self.feed_up_to = observe, max_tokens, feed_up_to
        for table in rows:
            table.clear()
        # By the sequence's index:
        self.turns: dict[int, Turns] = {}
        self._text: dict[int, list[int]] = {}  # of the turn under way, for stop strings
        self._pending: dict[int, list[int]] = {}  # of an observation, to be fed from the back
        self.tokens_observed = 0

    def fill(self, group: int) -> Admission:
        """The first samples of each group, in the order of the groups: even shares of them."""
        admission = Admission()
        share = -(-len(self.queue) // (len(self.rows) - group))
        self._start_waiting(group, share, admission)
        return admission

    def advance(
        self, group: int, drawn: np.ndarray, drew: np.ndarray | None = None
    ) -> tuple[list[Finished], Admission]:
        """Takes in the drawn tokens. A row whose turn is over goes on behind an observation, or to
        the next sample, or disappears; the sequences of the latter two are finished.

        `drew` bool [live]: the rows that took part in the step, where not all of them did."""
        rows = self.rows[group]
        n = rows.live
        tokens, given = self._with_observations(rows, drawn[:n])
        at = slice(None) if drew is None else drew
        self.tokens[rows.host_slots[:n][at], rows.host_keys[:n, 1][at]] = tokens[at]
        ended = self._ended(rows, tokens, given, drew)
        answers = self._answers([done for _, done in ended])
        finished, admission = [], Admission()
        for (row, done), answer in zip(ended, answers, strict=True):
            if answer is not None and self._go_on(rows, row, done, answer, admission):
                continue
            finished.append(done)
            self._replace(group, row, done.slot, admission)
        self._start_waiting(group, len(self.queue), admission)
        return finished, admission

    def _answers(self, ended: list[Finished]) -> ListLike[ListLike[int] | None]:
        for done in ended:
            turns = self.turns[done.sequence.index]
            turns.spans.append((turns.begin, done.length))
            turns.reasons.append(done.reason)
            self._text.pop(done.sequence.index, None)  # a stop string lies within one turn
        if self.observe is None or not ended:
            return [None] * len(ended)
        return self.observe([self._turn_end(done) for done in ended])

    def _with_observations(
        self, rows: decoding.Rows, drawn: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(tokens, given): where a row is being fed an observation, its token and not the drawn
        one; `given` says which rows those are, if there are any."""
        if not self._pending:
            return drawn, None
        tokens, given = drawn.copy(), np.zeros(rows.live, dtype=bool)
        for row, sequence in enumerate(rows.sequences):
            pending = self._pending.get(sequence.index)
            if pending is None:
                continue
            tokens[row], given[row] = pending.pop(), True
            if not pending:
                del self._pending[sequence.index]
        return tokens, given

    def _ended(
        self,
        rows: decoding.Rows,
        tokens: np.ndarray,
        given: np.ndarray | None,
        drew: np.ndarray | None,
    ) -> list[tuple[int, Finished]]:
        """Moves every row on and finds those whose turn is over, from the back: so a row that moves
        forward into a gap was already looked at."""
        n = rows.live
        if n and tokens.min() < 0:
            self._refuse(rows, int(tokens.argmin()))
        rows.advance(tokens, drew)
        stopped = (tokens[:, None] == self.stop_tokens).any(1)
        if given is not None:
            stopped &= ~given
        full = rows.host_positions[:n] >= rows.last_positions[:n]
        over = stopped | full
        if drew is not None:
            over &= drew
        in_text = np.zeros(n, dtype=bool)
        if self.stop_strings:
            said = drew if given is None else ~given
            for row in range(n) if said is None else np.flatnonzero(said).tolist():
                sequence = rows.sequences[row]
                in_text[row] = self._in_text(sequence, int(tokens[row]), stopped[row])
            over |= in_text
        ended = []
        for row in np.flatnonzero(over)[::-1].tolist():
            reason: FinishReason = "length"
            if stopped[row]:
                reason = "stop"
            elif in_text[row]:
                reason = "stop_string"
            slot = int(rows.host_slots[row])
            length = int(rows.host_positions[row]) + 1
            ended.append((row, Finished(rows.sequences[row], slot, length, reason)))
        return ended

    def _turn_end(self, done: Finished) -> TurnEnd:
        turns = self.turns[done.sequence.index]
        return TurnEnd(
            done.sequence.sequence_id,
            len(turns.spans) - 1,
            self.tokens[done.slot, turns.begin : done.length].tolist(),
            done.reason,
            max(self.max_tokens - done.length - 1, 0),
        )

    def _go_on(
        self,
        rows: decoding.Rows,
        row: int,
        done: Finished,
        observation: ListLike[int],
        admission: Admission,
    ) -> bool:
        """The turn's last token has not been through the model yet, and the observation's last is
        the next step's input: as many tokens are prefilled as the observation has."""
        turns, count = self.turns[done.sequence.index], len(observation)
        if done.length + count >= self.max_tokens:
            turns.full = True
            return False
        turns.begin = done.length + count
        self.tokens_observed += count
        held, places = done.length - 1, self.tokens.shape[1] - 1
        if count <= self.feed_up_to or held + padded_length(count) > places:
            self._pending[done.sequence.index] = list(observation)[::-1]
        else:
            last = int(rows.host_tokens[row])
            admission.continued[done.slot] = (held, [last, *observation[:-1]])
            self.tokens[done.slot, done.length : turns.begin] = observation
            rows.host_tokens[row] = observation[-1]
            rows.host_positions[row] += count
            rows.host_keys[row, 1] += count
        self._limit(rows, row)
        return True

    def _limit(self, rows: decoding.Rows, row: int) -> None:
        """Where the turn under way ends at the latest."""
        sequence = rows.sequences[row]
        end = self.turns[sequence.index].begin + sequence.request.max_new_tokens
        rows.last_positions[row] = min(end, self.max_tokens) - 1

    def _replace(self, group: int, row: int, slot: int, admission: Admission) -> None:
        """A finished row goes to the next sample, or disappears."""
        self.pages.give_back(slot)
        if self._next_fits():
            self._start(self.rows[group], row, slot, admission)
        else:
            self.rows[group].remove(row)
            self._free[group].append(slot)

    def _next_fits(self) -> bool:
        return bool(self.queue) and self.pages.fits(self.queue[0].request_index)

    def _start_waiting(self, group: int, most: int, admission: Admission) -> None:
        """What waited for pages, in slots that nobody has."""
        rows, free = self.rows[group], self._free[group]
        while most and free and self._next_fits():
            self._start(rows, rows.live, free.pop(), admission)
            most -= 1
        rows.upload()
        self.pages.upload()

    def _start(self, rows: decoding.Rows, row: int, slot: int, admission: Admission) -> None:
        sequence = self.queue.popleft()
        rows.put(row, sequence, slot)
        prompt = sequence.request.prompt
        self.turns[sequence.index] = Turns(len(prompt))
        self._limit(rows, row)
        if self.pages.take(slot, sequence.request_index):
            admission.prefills[slot] = prompt[:-1]  # the last one is the first step's input

    def _in_text(self, sequence: decoding.Sequence, token: int, stopped: bool) -> bool:
        text = self._text.setdefault(sequence.index, [])
        text.append(token)
        return not stopped and self.stop_strings.reached(text)

    def _refuse(self, rows: decoding.Rows, row: int) -> None:
        sequence, position = rows.sequences[row], rows.host_positions[row] + 1
        raise RuntimeError(
            f"generate: no token can be drawn for sequence {sequence.sequence_id} at position "
            f"{position}: its logits hold a NaN, a +inf or nothing finite"
        )
