"""Prompts into the cache, several of one padded length at a time.

Nothing is sampled here: a prompt's last token is the first one that its samples decode, so a
prefill runs over the tokens before it and its output only feeds the next stage.

Letters: n prompts of a chunk, L their padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.generation.scheduler import Admission
from megarlx.model.documents import Documents, padded_length
from megarlx.model.kv_cache import CacheStep, KVCache
from megarlx.model.transformer import Stage


@dataclass(frozen=True)
class Chunk:
    """Padding stands behind a prompt: under causal attention only padding sees it, and decoding
    writes its places in the cache anew before it looks at them.
    """

    tokens: Tensor  # [n, L]
    slots: Tensor  # [n]

    @staticmethod
    def of(prompts: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> Chunk:
        length = padded_length(len(prompts[0][1]))
        rows = [[*tokens, *([0] * (length - len(tokens)))] for _, tokens in prompts]
        slots = [slot for slot, _ in prompts]
        return Chunk(torch.tensor(rows, device=device), torch.tensor(slots, device=device))

    def hidden_like(self, stage: Stage) -> Tensor:
        """An empty tensor for this chunk's hidden states in front of a stage."""
        split = stage.group.size if stage.sequence_parallel else 1
        some = next(stage.parameters())
        return some.new_empty(self.tokens.numel() // split, stage.config.hidden_size)


def chunks_of(admission: Admission, most_tokens: int, device: torch.device) -> list[Chunk]:
    """At most `most_tokens` tokens a chunk where that holds more than one prompt."""
    by_length: dict[int, list[tuple[int, Sequence[int]]]] = {}
    for slot, tokens in admission.prefills.items():
        by_length.setdefault(padded_length(len(tokens)), []).append((slot, tokens))
    chunks = []
    for length, prompts in sorted(by_length.items()):
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
        torch.zeros_like(chunk.slots),
        length,
        fresh=True,
    )
    out: Tensor = stage(chunk.tokens if hidden is None else hidden, cache=step)
    return out


def copy_prompts_(cache: KVCache, copies: dict[int, list[int]], lengths: dict[int, int]) -> None:
    """A prompt's keys and values to the slots of its other samples."""
    for source, targets in copies.items():
        index = torch.tensor(targets, device=cache.keys.device)
        cache.copy_slot_(source, index, lengths[source])
