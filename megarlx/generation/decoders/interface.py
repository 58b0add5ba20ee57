"""What a decoder is, and that a faster one says what the model's own layers say.

Letters: W rows of a step, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megarlx.comm.collectives import all_gather, all_reduce_
from megarlx.generation.rows import Rows
from megarlx.generation.widths import TILE
from megarlx.model.kv_cache import KVCache
from megarlx.model.transformer import Stage

# Natural logs of probability that a decoder may be off by. Rounding is 6e-6 in fp32; another
# activation, norm or rotation is tenths.
MOST_NATS = {torch.float64: 1e-9, torch.float32: 1e-3}
MOST_NATS_IN_HALF = 0.1


class Decoder(Protocol):
    """A stage's decode step. `implements` are the features (model/features.py) that it computes;
    None: whatever the layers are. `pads`: a row's bits depend on the step's width."""

    implements: ClassVar[frozenset[str] | None]
    pads: ClassVar[bool]

    stage: Stage

    def __init__(self, stage: Stage, cache: KVCache, most_rows: int) -> None: ...

    def begin(self) -> None:
        """Before a generation: weights may have changed, or been given other memory."""

    def hidden(self, width: int) -> Tensor:
        """[W, hidden]: what `forward` leaves, and what it starts from where nothing is embedded."""

    def forward(self, rows: Rows, width: int) -> Tensor:
        """The stage's layers for the newest token of every row."""

    def logits(self, width: int) -> Tensor:
        """[W, V] of what `forward` left, padding ids may be included."""


class WrongDecoder(RuntimeError):
    """A decoder that does not compute what its stage does."""


def checked_forward(
    decoder: Decoder, slow: Decoder, rows: Rows, width: int, exact: Decoder | None = None
) -> None:
    """`forward`, whose first rows must be those of `slow`; the ranks of a stage find out together.

    `slow` goes first, so that what stays in the cache is the decoder's own. `exact` is compared in
    place of a decoder that rounds the weights, which goes last then.
    """
    if exact is not None:
        exact.begin()
        exact.hidden(width).copy_(decoder.hidden(width))
        checked_forward(exact, slow, rows, width)
        decoder.forward(rows, width)
        return
    slow.begin()
    few = min(width, TILE)
    n, given, stage = min(rows.live, few), slow.hidden(few), decoder.stage
    # under sequence parallelism a rank's layers begin with its part of the rows
    part = stage.group.rank * len(given) if len(given) < few else 0
    given.copy_(decoder.hidden(width)[part : part + len(given)])
    slow.forward(rows, few)
    decoder.forward(rows, width)
    if stage.has_head:
        what, off = "nats", _nats_apart(stage, decoder.logits(width)[:n], slow.logits(few)[:n])
    else:
        whole = slow.hidden(few)
        if len(whole) < few:
            whole = all_gather(whole, stage.group)
        what = "of the largest hidden state"
        off = _apart(decoder.hidden(width)[:n], whole[:n]) / whole[:n].abs().max()
    all_reduce_(off, stage.group, op="max")
    _refuse(decoder, slow, off.item(), what, given.dtype)


def _refuse(decoder: Decoder, slow: Decoder, off: float, what: str, dtype: torch.dtype) -> None:
    allowed = MOST_NATS.get(dtype, MOST_NATS_IN_HALF)
    if off <= allowed:
        return
    raise WrongDecoder(
        f"generate: on the first step {type(decoder).__name__} is {off:.2g} {what} off "
        f"{type(slow).__name__}, which computes what the layers do; in {dtype} allowed is "
        f"{allowed:g}. A feature of the layers is not in `implements`, or none says it"
    )


def _nats_apart(stage: Stage, found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of log-probs, over all parts of the vocabulary that this rank has."""
    begin = stage.group.rank * len(stage.head_weight)
    real = min(max(stage.config.vocab_size - begin, 0), len(stage.head_weight))
    both = torch.stack((found[:, :real].to(expected.dtype), expected[:, :real]))
    own = both.logsumexp(-1)
    most = all_reduce_(own.clone(), stage.group, op="max")
    total = most + all_reduce_((own - most).exp(), stage.group).log()
    return _apart(*(both - total[..., None]))


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference. What is no number on both sides is the model's doing."""
    off = (a - b).abs().nan_to_num(nan=torch.inf)
    alike = (a == b) | (a.isnan() & b.isnan())
    return off.masked_fill(alike, 0.0).max().reshape(1) if off.numel() else off.new_zeros(1)
