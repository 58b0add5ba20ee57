"""A step's sequences, dealt out to processes."""

from __future__ import annotations


def uneven(sequences_per_step: int, at_once: int, times: str) -> str | None:
    """What is wrong with a step's sequences, as said of their key, where processes that take
    `at_once` together, sequences_per_microbatch x `times`, cannot share them."""
    if sequences_per_step % at_once == 0:
        return None
    below = sequences_per_step // at_once * at_once
    nearest = " or ".join(str(n) for n in (below, below + at_once) if n > 0)
    return (
        f"is {sequences_per_step}; sequences_per_microbatch x {times} = {at_once} must divide it "
        f"(nearest: {nearest})"
    )
