"""One micro-batch, a stage called on it, and what comes back.

The first stage is given the micro-batch's tokens, every other one the hidden states of the stage
before it; all are told the same of its documents. The last stage's forward ends in norm, head and
the loss that it is given. It returns the loss with shape [1], or (loss, outputs) where `outputs` is
a dict of tensors to hand to the caller (log-probs, metrics), or in an evaluation the dict alone.
The loss must live in `forward`, because split schedules see only gradients of what a stage's own
forward used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from megarlx.ops import Head, LossInputs, TokenLoss

Loss = Callable[[Head, LossInputs], TokenLoss]


@dataclass(frozen=True)
class Microbatch:
    """What a rank takes through the model at once."""

    tokens: Tensor  # int64 [rows, length]
    inputs: LossInputs  # for the loss
    documents: Tensor | None = None  # int32, offsets in the tokens one after another; None: rows
    longest: int | None = None  # no document has more tokens
    positions: Tensor | None = None  # of each token; None: from its document's beginning


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


def check_microbatches(parts: Sequence[Microbatch]) -> None:
    if not parts:
        raise ValueError("pipeline: there are 0 micro-batches; at least 1 is needed")
    shapes = sorted({tuple(part.tokens.shape) for part in parts})
    if len(shapes) > 1:
        raise ValueError(
            f"pipeline: micro-batches have tokens of the shapes {shapes}; all must have the same"
        )


def call_stage(stage: nn.Module, hidden: Tensor | None, part: Microbatch, loss: Loss | None) -> Any:
    return stage(
        part.tokens if hidden is None else hidden,
        documents=part.documents,
        longest=part.longest,
        positions=part.positions,
        loss_inputs=part.inputs,
        loss=loss,
    )
