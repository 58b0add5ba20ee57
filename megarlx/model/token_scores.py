"""What a model says of given texts: the log-prob of their tokens, as training computes it.

On any layout. Texts are packed one after another, each a document of its own, so what stands
beside a text changes its numbers by rounding only.

Letters: T places of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.comm.collectives import all_reduce_
from megarlx.model.build import ParallelModel
from megarlx.ops import Head, LossInputs, LossSpec, TokenLoss
from megarlx.ops.product import linear
from megarlx.parallel.microbatches import Microbatch

TILE = 16  # places of a pass are a multiple of it, for sequence parallelism
ROWS = 1024  # of logits at once, where the likeliest token is asked for


@dataclass(frozen=True)
class Text:
    """Tokens, of which those from `first` on are scored: it is at least 1."""

    tokens: Sequence[int] | Tensor
    first: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.first <= len(self.tokens):
            raise ValueError(
                f"text: first is {self.first}; allowed are 1 to its {len(self.tokens)} tokens"
            )


@dataclass(frozen=True)
class TokenScores:
    """Of each scored token of a text, in order."""

    logprobs: Tensor  # fp32, on the CPU
    likeliest: Tensor | None  # bool: no other token was likelier


def token_scores(
    model: ParallelModel,
    texts: Sequence[Text],
    *,
    tokens_per_pass: int = 4096,
    likeliest: bool = False,
) -> list[TokenScores]:
    """Without gradient. Every rank of a copy of the model is given the same texts; those of its
    last pipeline stage get the scores, the others nothing."""
    found: list[TokenScores] = []
    passes = _passes(texts, tokens_per_pass)
    # Passes are padded to one length: a pipeline makes a schedule for each shape.
    longest = max((sum(map(_places, part)) for part in passes), default=0)
    padded = -(-longest // TILE) * TILE
    device = model.pipeline.device
    for part in passes:
        captured: list[tuple[Tensor, Tensor | None]] = []

        def loss(
            head: Head,
            inputs: LossInputs,
            captured: list[tuple[Tensor, Tensor | None]] = captured,
        ) -> TokenLoss:
            assert inputs.mask is not None
            result = head.token_loss(inputs, LossSpec("nll"), normalizer=1.0)
            mask = inputs.mask.reshape(-1)
            best = None
            if likeliest:
                best = _are_likeliest(head, head.hidden[mask], inputs.targets.reshape(-1)[mask])
            captured.append((result.logprobs[mask], best))
            return result

        model.pipeline.forward_only([_packed(part, padded, device)], loss)
        sizes = [len(text.tokens) - text.first for text in part]
        for logprobs, best in captured:
            each = logprobs.float().cpu().split(sizes)
            of_best = [None] * len(part) if best is None else best.cpu().split(sizes)
            found += [TokenScores(a, b) for a, b in zip(each, of_best, strict=True)]
    return found


def _are_likeliest(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Whether each target's logit is the largest of its row, over all parts of the vocabulary."""
    weight, group = head.weight, head.group
    begin = group.rank * len(weight)
    real = min(max(head.vocab_size - begin, 0), len(weight))
    found = []
    for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        # [row's largest, target's], where this rank holds them
        table = rows.new_full((2, len(rows)), -torch.inf, dtype=torch.float32)
        if real:
            logits = linear(rows, weight[:real]).float()
            table[0] = logits.amax(1)
            place = wanted - begin
            here = (place >= 0) & (place < real)
            own = logits.gather(1, place.clamp(0, real - 1)[:, None])[:, 0]
            table[1] = own.masked_fill(~here, -torch.inf)
        all_reduce_(table, group, op="max")
        found.append(table[1] >= table[0])
    return torch.cat(found) if found else targets.bool()


def _places(text: Text) -> int:
    """The last token is a target only."""
    return len(text.tokens) - 1


def _passes(texts: Sequence[Text], most_tokens: int) -> list[list[Text]]:
    passes: list[list[Text]] = []
    filled = most_tokens
    for text in texts:
        length = _places(text)
        if not passes or filled + length > most_tokens:
            passes.append([])
            filled = 0
        passes[-1].append(text)
        filled += length
    return passes


def _packed(texts: Sequence[Text], padded: int, device: torch.device) -> Microbatch:
    """Documents one after another; only what is scored is looked at."""
    tokens = torch.zeros(padded, dtype=torch.int64)
    targets = torch.zeros(padded, dtype=torch.int64)
    mask = torch.zeros(padded, dtype=torch.bool)
    offsets, begin = [0], 0
    for text in texts:
        whole = torch.as_tensor(text.tokens)
        end = begin + len(whole) - 1
        tokens[begin:end], targets[begin:end] = whole[:-1], whole[1:]
        mask[begin + text.first - 1 : end] = True
        offsets.append(end)
        begin = end
    if begin < padded:
        offsets.append(padded)
    documents = torch.tensor(offsets, dtype=torch.int32)

    def sent(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True)

    inputs = LossInputs(sent(targets), sent(mask))
    return Microbatch(sent(tokens), inputs, sent(documents), int(documents.diff().max()))
