"""Supervised fine-tuning as a dataset: conversations packed into sequences, epoch after epoch.

Letters: S sequence_length.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megarlx.data.conversations import (
    Conversation,
    ConversationError,
    Template,
    choose_demonstrations,
)
from megarlx.data.order import key_of, shuffled
from megarlx.data.samples import Sample
from megarlx.data.tokenizer import Tokenizer

# Conversations that are packed among themselves: large enough to fill sequences well, small enough
# that an epoch stays in random order.
WINDOW = 256


def pack(lengths: Sequence[int], room: int, window: int = WINDOW) -> list[list[int]]:
    """Numbers of the items in each pack. Window by window, the longest first, each goes into the
    first pack of its window that has room."""
    packs: list[list[int]] = []
    for first in range(0, len(lengths), window):
        part = range(first, min(first + window, len(lengths)))
        made: list[list[int]] = []
        left: list[int] = []
        for item in sorted(part, key=lambda i: (-lengths[i], i)):
            at = next((i for i, space in enumerate(left) if space >= lengths[item]), len(left))
            if at == len(left):
                made.append([])
                left.append(room)
            made[at].append(item)
            left[at] -= lengths[item]
        packs += made
    return packs


@dataclass(frozen=True)
class PackedEpoch:
    packs: list[list[int]]  # conversations of each sequence
    tokens: npt.NDArray[np.int64]  # [packs + 1], tokens that are no padding, added up


class ConversationData:
    """Endless sequences of packed conversations; a sequence is its global index.

    Each conversation is a document of its own, so attention sees no other; the padding at the end
    of a sequence is one more document, of which no target counts.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        template: Template,
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int,
        *,
        demonstrations: Literal["one", "all"] = "one",
        packing: bool = True,
        too_long: Literal["stop", "skip"] = "stop",
        name: str = "sft",
    ) -> None:
        """`packing` off gives every conversation a sequence of its own."""
        self.sequence_length, self.seed, self.name = sequence_length, seed, name
        self.packing = packing
        self._pad = tokenizer.eos_id
        self._settings = {
            "demonstrations": demonstrations,
            "packing": packing,
            "template": template.described,
            "tokenizer": tokenizer.fingerprint,
        }
        self.too_long = 0
        ids: list[npt.NDArray[np.int32]] = []
        learned: list[npt.NDArray[np.bool_]] = []
        for conversation in choose_demonstrations(conversations, demonstrations, seed):
            these, says = _encoded(conversation, template, tokenizer)
            if len(these) < 2 or not any(says[1:]):
                raise ConversationError(f"{_shown(conversation)}: has no token to learn")
            if len(these) - 1 > sequence_length:
                if too_long == "stop":
                    raise ConversationError(
                        f"{_shown(conversation)}: has {len(these)} tokens; sequence_length "
                        f"{sequence_length} allows {sequence_length + 1}; {name}.too_long = 'skip' "
                        "leaves such conversations out"
                    )
                self.too_long += 1
                continue
            ids.append(np.array(these, np.int32))
            learned.append(np.array(says))
        if not ids:
            raise ConversationError(
                f"{name}: no conversation to learn from ({self.too_long} were too long)"
            )
        self._bounds = np.cumsum([0, *map(len, ids)])
        self._ids, self._learned = np.concatenate(ids), np.concatenate(learned)
        self._lengths = np.diff(self._bounds) - 1  # the last token is a target only
        self._starts = [0]  # the first sequence of each epoch known so far
        self._tokens = [0]  # tokens before each epoch known so far
        self._epochs: dict[int, PackedEpoch] = {}
        # The prefetch thread reads sequences while the training loop asks for counts.
        self._lock = threading.RLock()

    @property
    def conversations(self) -> int:
        return len(self._lengths)

    def _epoch(self, number: int) -> PackedEpoch:
        with self._lock:
            return self._kept_or_made(number)

    def _kept_or_made(self, number: int) -> PackedEpoch:
        if (kept := self._epochs.get(number)) is not None:
            return kept
        order = shuffled(self.conversations, key_of(self.seed, self.name, number))
        lengths = self._lengths[order].tolist()
        if self.packing:
            packs = pack(lengths, self.sequence_length)
        else:
            packs = [[i] for i in range(len(lengths))]
        counts = [sum(lengths[i] for i in items) for items in packs]
        packs = [[int(order[i]) for i in items] for items in packs]
        for old in [n for n in self._epochs if n < number - 1 or n > number]:
            del self._epochs[old]
        self._epochs[number] = PackedEpoch(packs, np.cumsum([0, *counts]))
        return self._epochs[number]

    def sequences_in_epochs(self, epochs: int) -> int:
        """Sequences from the start to the end of epoch `epochs` (counted from 1)."""
        with self._lock:
            while len(self._starts) <= epochs:
                epoch = self._epoch(len(self._starts) - 1)
                self._tokens.append(self._tokens[-1] + int(epoch.tokens[-1]))
                self._starts.append(self._starts[-1] + len(epoch.packs))
            return self._starts[epochs]

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, place in it) of a global index."""
        if index < 0:
            raise IndexError(f"{self.name}: sequence {index}; they are counted from 0")
        while self._starts[-1] <= index:
            self.sequences_in_epochs(len(self._starts))
        epoch = bisect.bisect_right(self._starts, index) - 1
        return epoch, index - self._starts[epoch]

    def sample(self, index: int) -> Sample:
        epoch, place = self.locate(index)
        inputs = np.full(self.sequence_length, self._pad, np.int64)
        targets = inputs.copy()
        mask = np.zeros(self.sequence_length, np.bool_)
        at, lengths = 0, []
        for conversation in self._epoch(epoch).packs[place]:
            begin, length = int(self._bounds[conversation]), int(self._lengths[conversation])
            here, next_ids = slice(at, at + length), slice(begin + 1, begin + 1 + length)
            inputs[here] = self._ids[begin : begin + length]
            targets[here] = self._ids[next_ids]
            mask[here] = self._learned[next_ids]
            lengths.append(length)
            at += length
        if at < self.sequence_length:
            lengths.append(self.sequence_length - at)
        return Sample(inputs, targets, mask, tuple(lengths), 0)

    def tokens_by_source(self, consumed_sequences: int) -> dict[str, int]:
        """Without padding."""
        epoch, place = self.locate(consumed_sequences)
        self.sequences_in_epochs(epoch)
        return {self.name: self._tokens[epoch] + int(self._epoch(epoch).tokens[place])}

    def fingerprint(self) -> dict[str, object]:
        digest = hashlib.sha256(self._bounds.astype("<i8").tobytes())
        digest.update(self._ids.astype("<i4").tobytes())
        digest.update(self._learned.tobytes())
        return {
            "name": self.name,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            **self._settings,
            "conversations": self.conversations,
            "sha256": digest.hexdigest(),
        }


def _shown(conversation: Conversation) -> str:
    text = conversation.turns[0].content
    return f"conversation that begins {text[:60]!r}"


def _encoded(
    conversation: Conversation, template: Template, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """A text alone is in no template, and all of it is learned."""
    first = conversation.turns[0]
    if first.role != "text":
        return template.encode(conversation, tokenizer)
    ids = [*tokenizer.begun(tokenizer.encode(first.content)), tokenizer.eos_id]
    return ids, [True] * len(ids)
