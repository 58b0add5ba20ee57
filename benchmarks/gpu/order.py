"""Every piece, in the order of what it is worth, and the calls of a card that is lent for minutes.

Seconds are those of one H200 where a piece has run there, else expected.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu import (
    attention,
    correct,
    counters,
    decode_parts,
    decoding,
    elementwise,
    losses,
    machine,
    products,
    sampling,
    study,
    training,
    updates,
)
from gpu.pieces import Piece

MODULES = (
    *(attention, correct, counters, decode_parts, decoding, elementwise, losses),
    *(machine, products, sampling, study, training, updates),
)
KNOWN: dict[str, Piece] = {piece.name: piece for module in MODULES for piece in module.PIECES}


@dataclass(frozen=True)
class Call:
    """What is run together: `seconds` from the start of the program to its end."""

    seconds: float
    words: tuple[str, ...]


# A word with + runs its pieces side by side: tests and the sanitizer need no idle card.
CALLS = {
    # Training and decode at a glance; what was wrong, and whole runs.
    1: Call(
        205,
        (
            *("machine", "kernels-once", "train-torch", "decode-1"),
            "tests-ops+tests-layouts+tests-model+doctor+whole_runs:160",
        ),
    ),
    # Speed: of the whole, of each kernel against its floor, by a step's shape; the sanitizer.
    2: Call(
        345,
        (
            *(
                "machine",
                "train-torch-cudnn",
                "train-te",
                "train-te-fp8",
                "decode-256",
                "prefill",
                "grpo",
            ),
            *("decode-8", "decode-1-fp8", "train-small"),
            *("average_adamw-2", "average_adamw-1", "replica_average"),
            *("token_loss-151936", "linear_loss-151936", "sample-deviation1", "elementwise"),
            *("decode_parts", "products"),
            *("attention", "token_loss-50304", "sample-deviation5"),
            *("train-by-shape", "memcheck+racecheck:60"),
        ),
    ),
    # Two baselines more, and the study with what is left.
    3: Call(115, ("machine", "linear_loss-50304", "average_adamw-te", "study:300")),
}
# What no call has room for.
REST = (
    *("counters", "attention-packages", "linear_loss-memory", "train-te-fp8-delayed"),
    *("groups", "decode-32", "decode-256-fp8"),
    *("sample-growth", "linear_loss-growth", "decode-growth", "compile"),
)


def everything() -> list[str]:
    """The words of all calls and of the rest, each piece once."""
    words: list[str] = []
    for word in (*(word for call in CALLS.values() for word in call.words), *REST):
        if word not in words:
            words.append(word)
    return words
