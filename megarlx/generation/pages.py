"""Which sequence holds which pages of the caches: those of its prompt, with its other samples, and
its own.

A sequence takes all the pages that it may come to fill when it starts, and gives them back when it
is over. So it may have to wait before it starts and never after, and whoever is under way comes to
an end. The queue's first waits for those, and nobody overtakes it: what it needs comes free, since
no sequence needs more than all pages (checked before anything starts). So nothing waits for ever.

Every rank of a pipeline keeps one of these; as they see the same starts and ends, all agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megarlx.generation.requests import Request
from megarlx.model.kv_cache import IDLE_PAGE, PageTable


@dataclass
class _Prompt:
    pages: list[int]
    samples_left: int


@dataclass
class _Held:
    request_index: int
    pages: list[int] = field(default_factory=list)


class Pages:
    """Of one generation; all pages are free in the beginning."""

    def __init__(
        self, table: PageTable, requests: Sequence[Request], max_tokens: int, turns: bool
    ) -> None:
        """`max_tokens` of a sequence; `turns`: one may go on behind its first turn."""
        self.table, self.requests = table, requests
        self.max_tokens, self.turns = max_tokens, turns
        self.most_held = 0
        on_cpu = table.rows.device.type == "cpu"
        self._rows = table.rows.numpy() if on_cpu else np.zeros(table.rows.shape, dtype=np.int32)
        self._rows.fill(IDLE_PAGE)
        self._rows[:, 0] = 0
        self._changed = True
        self._free = list(range(table.pages - 1, IDLE_PAGE, -1))
        self._prompts: dict[int, _Prompt] = {}
        self._held: dict[int, _Held] = {}
        self._check()

    @property
    def held(self) -> int:
        return self.table.pages - 1 - len(self._free)

    def fits(self, request_index: int) -> bool:
        """Whether a sample of this request can start now."""
        first, own = self._needs(request_index)
        return own + (0 if request_index in self._prompts else first) <= len(self._free)

    def take(self, slot: int, request_index: int) -> bool:
        """For a sample that fits; whether what stands before its last token has to be computed."""
        request = self.requests[request_index]
        first, own = self._needs(request_index)
        prompt = self._prompts.get(request_index)
        is_new = prompt is None or not self.table.shares
        if prompt is None:
            prompt = _Prompt(self._taken(first), len(request.sequence_ids))
            self._prompts[request_index] = prompt
        held = self._held[slot] = _Held(request_index, self._taken(own))
        row, of_slot = self._rows[slot], self.table.of_slot
        row[:] = IDLE_PAGE
        row[0] = len(request.prompt) - 1 if self.table.shares else 0
        row[1 : 1 + first] = prompt.pages
        row[1 + of_slot :][:own] = held.pages
        self._changed = True
        self.most_held = max(self.most_held, self.held)
        return is_new and len(request.prompt) > 1

    def give_back(self, slot: int) -> None:
        held = self._held.pop(slot)
        self._free += held.pages[::-1]
        prompt = self._prompts[held.request_index]
        prompt.samples_left -= 1
        if not prompt.samples_left:
            self._free += self._prompts.pop(held.request_index).pages[::-1]

    def upload(self) -> None:
        """Before the next step or prefill; behind what the device has been given to do."""
        rows = self.table.rows
        if self._changed and rows.device.type != "cpu":
            sent = torch.from_numpy(self._rows.copy())
            rows.copy_(sent.pin_memory() if rows.is_cuda else sent, non_blocking=True)
        self._changed = False

    def _needs(self, request_index: int) -> tuple[int, int]:
        """Pages of the part that samples share and of a sample's own. The last token of a sequence
        is never put through the model."""
        request = self.requests[request_index]
        length = len(request.prompt)
        end = self.max_tokens
        if not self.turns:
            end = min(end, length + request.max_new_tokens)
        first = length - 1 if self.table.shares else 0
        return self._pages_of(first), self._pages_of(end - 1 - first)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.table.size)

    def _taken(self, count: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]

    def _check(self) -> None:
        for index in range(len(self.requests)):
            needed, most = sum(self._needs(index)), self.table.pages - 1
            if needed > most:
                raise ValueError(
                    f"generate: request {index} needs {needed} pages of {self.table.size} tokens; "
                    f"allowed: at most {most}, what the caches hold (cache_tokens)"
                )
