"""Which sequence decodes in which slot, from the first prompt to the last token.

Its decisions follow from the requests and the tokens alone, so every rank of a pipeline keeps one
and all agree without a word about it.

Samples start in the order of the requests. So while samples of a group are waiting, nothing later
has started, and a slot that once held the group's prompt holds it still: a prompt is computed once
for all its samples, however few slots there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import numpy as np

from megarlx.generation import rows as decoding
from megarlx.generation.requests import FinishReason, Request, SamplingSettings
from megarlx.generation.stop import StopStrings


@dataclass
class Admission:
    """What the cache needs before the next step, in this order: copies of prompts computed before
    (prefills may overwrite their slots), prefills, copies of those.
    """

    early_copies: dict[int, list[int]] = field(default_factory=dict)  # slot -> slots
    prefills: dict[int, ListLike[int]] = field(default_factory=dict)  # slot -> tokens
    copies: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)  # tokens of each copied slot
    # slot -> (tokens it holds, tokens behind them): a sequence that goes on after an observation
    continued: dict[int, tuple[int, ListLike[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    sequence: decoding.Sequence
    slot: int
    length: int  # prompt and completion
    reason: FinishReason


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
    ) -> None:
        samples = [(i, r, s) for i, r in enumerate(requests) for s in r.sequence_ids]
        self.queue = deque(
            decoding.Sequence(index, i, request, sequence_id)
            for index, (i, request, sequence_id) in enumerate(samples)
        )
        self.stop_tokens = np.array(sampling.stop_tokens, dtype=np.int64)
        self.stop_strings = stop_strings
        self.rows, self._slots = rows, slots
        for table in rows:
            table.clear()
        self._prefix: tuple[int, int] | None = None  # (request, slot that holds its prompt)
        self._text: dict[int, list[int]] = {}  # by sequence id, for stop strings

    def fill(self, group: int) -> Admission:
        """The first samples of each group, in the order of the groups: even shares of them."""
        rows, admission = self.rows[group], Admission()
        share = -(-len(self.queue) // (len(self.rows) - group))
        for slot in self._slots[group][:share]:
            self._start(rows, rows.live, slot, admission)
        rows.upload()
        return admission

    def advance(self, group: int, tokens: np.ndarray) -> tuple[list[Finished], Admission]:
        """Takes in the drawn tokens; finished rows go to the next samples or disappear."""
        rows = self.rows[group]
        ended = self._ended(rows, tokens)
        admission = Admission()
        for row, done in ended:
            self._replace(rows, row, done.slot, admission)
        rows.upload()
        return [done for _, done in ended], admission

    def _ended(
        self, rows: decoding.Rows, tokens: np.ndarray, given: np.ndarray | None = None
    ) -> list[tuple[int, Finished]]:
        """Moves every row on and finds those that are over, from the back: so a row that moves
        forward into a gap was already looked at. `given` rows got a token that was not drawn."""
        n = rows.live
        tokens = tokens[:n]
        if n and tokens.min() < 0:
            self._refuse(rows, int(tokens.argmin()))
        rows.advance(tokens)
        stopped = (tokens[:, None] == self.stop_tokens).any(1)
        if given is not None:
            stopped &= ~given
        full = rows.host_positions[:n] >= rows.last_positions[:n]
        over = stopped | full
        in_text = np.zeros(n, dtype=bool)
        if self.stop_strings:
            for row in range(n):
                if given is None or not given[row]:
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

    def _replace(self, rows: decoding.Rows, row: int, slot: int, admission: Admission) -> None:
        """A finished row goes to the next sample, or disappears."""
        if self.queue:
            self._start(rows, row, slot, admission)
        else:
            rows.remove(row)

    def _start(self, rows: decoding.Rows, row: int, slot: int, admission: Admission) -> None:
        sequence = self.queue.popleft()
        rows.put(row, sequence, slot)
        before_last = sequence.request.prompt[:-1]  # the last one is the first step's input
        if not before_last:
            return
        if self._prefix is not None and self._prefix[0] == sequence.request_index:
            source = self._prefix[1]
            if source != slot:
                new = source in admission.prefills
                copies = admission.copies if new else admission.early_copies
                copies.setdefault(source, []).append(slot)
                admission.lengths[source] = len(before_last)
            return
        self._prefix = (sequence.request_index, slot)
        admission.prefills[slot] = before_last

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
