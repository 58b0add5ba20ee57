"""Inputs cut into micro-batches, a stage called on one of them, and what comes back.

A stage is an ordinary module, called as

    stage(tokens or hidden, **fields)

The first stage is given the micro-batch's tokens, every other one the hidden states of the stage
before it. The fields (targets, masks, advantages, positions, cu_seqlens ...) are the micro-batch's
slice of the inputs along their first dimension; numbers and tensors without dimensions go to each
micro-batch whole. The last stage's forward ends in norm, head and token loss. It returns the loss
with shape [1], or (loss, outputs) where `outputs` is a dict of tensors to hand to the caller
(log-probs, metrics), or in an evaluation the dict alone. It must live in `forward` because split
schedules see only gradients of what a stage's own forward used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Inputs = Mapping[str, Any]
Microbatch = dict[str, Any]


@dataclass
class Results:
    """What the last stage computed; empty on ranks that do not hold it."""

    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch, shape [1], detached
    outputs: list[dict[str, Tensor]] = field(default_factory=list)  # of each, detached

    def take(self, output: Any, *, needs_loss: bool) -> Tensor | tuple[()]:
        """Keeps what the last stage returned; gives back the loss, to go backward from."""
        loss, outputs = output if isinstance(output, tuple) else (output, {})
        if isinstance(output, dict):
            loss, outputs = None, output
        self.outputs.append({name: value.detach() for name, value in outputs.items()})
        if loss is None:
            if needs_loss:
                raise ValueError(f"pipeline: the last stage returned {sorted(outputs)} and no loss")
            return ()
        if loss.shape != (1,):
            raise ValueError(
                f"pipeline: the last stage's loss has the shape {list(loss.shape)}; it must be [1]"
            )
        self.losses.append(loss.detach())
        return loss


def split_microbatches(inputs: Inputs, count: int) -> list[Microbatch]:
    """Cuts every tensor's first dimension into `count` equal views."""
    if "tokens" not in inputs:
        raise ValueError(f"pipeline: inputs are {sorted(inputs)}; 'tokens' is missing")
    parts: list[Microbatch] = [{} for _ in range(count)]
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            slices: Sequence[Any] = [value] * count
        elif len(value) % count or len(value) == 0:
            raise ValueError(
                f"pipeline: inputs['{name}'] has the shape {list(value.shape)}; the first "
                f"dimension must be a multiple of the {count} micro-batches"
            )
        else:
            slices = value.split(len(value) // count)
        for part, piece in zip(parts, slices, strict=True):
            part[name] = piece
    return parts


def call_stage(stage: nn.Module, hidden: Tensor | None, part: Microbatch) -> Any:
    fields = {name: value for name, value in part.items() if name != "tokens"}
    return stage(part["tokens"] if hidden is None else hidden, **fields)
