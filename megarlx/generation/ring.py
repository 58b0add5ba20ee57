"""Generation through a pipeline: groups of rows go round, so that every stage has one to work on.

As many groups as ranks. At tick t, rank r works on item t - r: group `item % ranks`, chunk
`item // ranks % chunks` (the stages it holds, where it holds several). Hidden states go to the next
rank; from the last one drawn token ids go to the first, and on from there with the next step, so
that every rank's scheduler learns them. A rank posts a receive only when it knows that its
neighbour will send.

One rank alone is a ring without messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.comm.collectives import receive_, send
from megarlx.comm.groups import Group


@dataclass(frozen=True)
class Item:
    """What a rank does in one tick."""

    group: int
    chunk: int
    step: int

    @staticmethod
    def number(index: int, groups: int, chunks: int) -> Item:
        round_, group = divmod(index, groups)
        step, chunk = divmod(round_, chunks)
        return Item(group, chunk, step)


class Ring:
    """Messages between neighbours of `group`, whose ranks are the pipeline's."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self.outgoing: list[Tensor] = []

    def turn(self, receive: Callable[[], None]) -> None:
        """Sends what the last tick made and takes in what the next one needs.

        A send may wait until its receiver is there. Even ranks send first and odd ones receive
        first, so in no ring does everybody wait for the next.
        """
        made, self.outgoing = self.outgoing, []
        if self.group.rank % 2 == 0:
            self._send(made)
            receive()
        else:
            receive()
            self._send(made)

    def flush(self) -> None:
        """At the end: what the others still wait for."""
        made, self.outgoing = self.outgoing, []
        self._send(made)

    def _send(self, tensors: list[Tensor]) -> None:
        following = (self.group.rank + 1) % self.group.size
        for tensor in tensors:
            send(tensor, self.group, following)

    def receive_(self, tensor: Tensor) -> Tensor:
        return receive_(tensor, self.group, (self.group.rank - 1) % self.group.size)
