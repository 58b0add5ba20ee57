"""The rows of a decode step: which sequence each belongs to, and where it stands.

W rows at most. Live rows come first, without gaps; the slots of the cache do not move with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megarlx.generation.requests import Request


@dataclass
class Sequence:
    """A sample under way."""

    index: int  # of the completion, in the order of the requests
    request_index: int
    request: Request
    sequence_id: int


class Rows:
    """Host arrays, and their twins on the device. On a CPU they are the same memory."""

    def __init__(self, most: int, idle_slot: int, device: torch.device) -> None:
        pinned = device.type == "cuda"

        # one allocation, so that one copy brings all of it to the device
        self._host = torch.zeros(5 * most, dtype=torch.int64, pin_memory=pinned)
        self._device = self._host.to(device) if pinned else self._host
        self.tokens, self.positions, self.slots, self.keys = _tables(self._device, most)
        self.host_tokens, self.host_positions, self.host_slots, self.host_keys = (
            table.numpy() for table in _tables(self._host, most)
        )
        # of the last token allowed; the scheduler says where that is
        self.last_positions = np.zeros(most, dtype=np.int64)
        self.sequences: list[Sequence] = []
        self.most, self.idle_slot, self.apart = most, idle_slot, pinned
        self.clear()

    def clear(self) -> None:
        self.sequences.clear()
        self._host.zero_()
        self.host_slots[:] = self.idle_slot

    @property
    def live(self) -> int:
        return len(self.sequences)

    def put(self, row: int, sequence: Sequence, slot: int) -> None:
        """`row` is a finished one, or the first behind the live ones."""
        if row == self.live:
            self.sequences.append(sequence)
        else:
            self.sequences[row] = sequence
        prompt = sequence.request.prompt
        self.host_tokens[row] = prompt[-1]
        self.host_positions[row] = len(prompt) - 1
        self.host_slots[row] = slot
        self.host_keys[row] = sequence.sequence_id, len(prompt)

    def remove(self, row: int) -> None:
        """The last live row takes the place."""
        last = self.live - 1
        for table in (self.host_tokens, self.host_positions, self.host_slots, self.host_keys):
            table[row] = table[last]
        self.last_positions[row] = self.last_positions[last]
        self.sequences[row] = self.sequences[last]
        self.sequences.pop()
        self.host_tokens[last] = self.host_positions[last] = 0
        self.host_slots[last], self.host_keys[last] = self.idle_slot, 0

    def advance(self, tokens: np.ndarray, drew: np.ndarray | None = None) -> None:
        """Every live row by the token drawn for it; `drew` bool [live]: only these rows."""
        n = self.live
        if drew is None:
            self.host_tokens[:n] = tokens[:n]
            self.host_positions[:n] += 1
            self.host_keys[:n, 1] += 1
        else:
            self.host_tokens[:n][drew] = tokens[drew]
            self.host_positions[:n] += drew
            self.host_keys[:n, 1] += drew

    def upload(self) -> None:
        """After the host arrays changed; a CPU has nothing to send."""
        if self.apart:
            self._device.copy_(self._host, non_blocking=True)


def _tables(flat: torch.Tensor, most: int) -> tuple[torch.Tensor, ...]:
    """tokens [W], positions [W], slots [W], keys [W, 2]: sequence id, position to be drawn."""
    tokens, positions, slots, keys = flat.split((most, most, most, 2 * most))
    return tokens, positions, slots, keys.view(most, 2)
