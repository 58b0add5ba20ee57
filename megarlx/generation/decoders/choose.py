"""The decoder that a stage gets: the fastest one that computes all that its layers do."""

from __future__ import annotations

from megarlx.generation.decoders.fused import FusedDecoder
from megarlx.generation.decoders.in_place import InPlaceDecoder
from megarlx.generation.decoders.interface import Decoder
from megarlx.generation.decoders.packed import PackedDecoder
from megarlx.generation.decoders.stage import StageDecoder
from megarlx.model.features import features
from megarlx.model.transformer import Stage

# The fastest first; the last covers everything.
DECODERS: tuple[type[Decoder], ...] = (
    PackedDecoder,
    FusedDecoder,
    InPlaceDecoder,
    StageDecoder,
)


def decoder_of(stage: Stage) -> type[Decoder]:
    found = features(stage)
    return next(d for d in DECODERS if d.implements is None or found <= d.implements)
