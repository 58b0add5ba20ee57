"""Prompts into the cache, several of one padded length at a time; and observations behind turns.

Nothing is sampled here: a prompt's last token is the first one that its samples decode, so a
prefill runs over the tokens before it and its output only feeds the next stage.

Letters: n prompts of a chunk, L their padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarlx.generation.scheduler import Admission
from megarlx.model.documents import Documents, padded_length
from megarlx.model.kv_cache import CacheStep, KVCache
from megarlx.model.transformer import Stage


class Prefill(NamedTuple):
    slot: int
    start: int  # tokens the slot holds already
    tokens: Sequence[int]


@dataclass(frozen=True)
class Chunk:
    """Padding stands behind a prompt: under causal attention only padding sees it, and decoding
    writes its places in the cache anew before it looks at them.
    """

    tokens: Tensor  # [n, L]
    slots: Tensor  # [n]
    starts: Tensor  # [n], tokens the slots hold before
    held: int  # the most of them

    @staticmethod
    def of(prompts: Sequence[Prefill], device: torch.device) -> Chunk:
        length = padded_length(len(prompts[0].tokens))
        rows = [[*p.tokens, *([0] * (length - len(p.tokens)))] for p in prompts]
        slots, starts = [p.slot for p in prompts], [p.start for p in prompts]
        tokens, at, held = (_sent(values, device) for values in (rows, slots, starts))
        return Chunk(tokens, at, held, max(starts))

    def hidden_like(self, stage: Stage) -> Tensor:
        """An empty tensor for this chunk's hidden states in front of a stage."""
        split = stage.group.size if stage.sequence_parallel else 1
        some = next(stage.parameters())
        return some.new_empty(self.tokens.numel() // split, stage.config.hidden_size)


def chunks_of(admission: Admission, most_tokens: int, device: torch.device) -> list[Chunk]:
    """At most `most_tokens` tokens a chunk where that holds more than one prompt."""
    everything = [Prefill(slot, 0, tokens) for slot, tokens in admission.prefills.items()]
    everything += [Prefill(slot, *held) for slot, held in admission.continued.items()]
    alike: dict[tuple[bool, int], list[Prefill]] = {}
    for prompt in everything:
        alike.setdefault((prompt.start > 0, padded_length(len(prompt.tokens))), []).append(prompt)
    chunks = []
    for (_, length), prompts in sorted(alike.items()):
        many = max(1, most_tokens // length)
        for first in range(0, len(prompts), many):
            chunks.append(Chunk.of(prompts[first : first + many], device))
    return chunks


def prefill(stage: Stage, cache: KVCache, chunk: Chunk, hidden: Tensor | None) -> Tensor:
    """The chunk through a stage; `hidden` is what the stage before made of it."""
    n, length = chunk.tokens.shape
    step = CacheStep(
        cache,
        Documents.rows(n, length, chunk.tokens.device),
        chunk.slots,
        chunk.starts,
        chunk.held + length,
        fresh=chunk.held == 0,
    )
    out: Tensor = stage(chunk.tokens if hidden is None else hidden, cache=step)
    return out


def _sent(values: Sequence[Any], device: torch.device) -> Tensor:
    """Without a wait for what the device is busy with."""
    return torch.tensor(values).to(device, non_blocking=True)
