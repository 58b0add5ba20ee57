"""A micro-batch's forward and backward as one graph: one launch where there were hundreds.

For small models, whose kernels end before the host has launched the next ones. The graph reads a
micro-batch from tensors of its own, into which every micro-batch is copied, and adds to the
gradients where they always are: weights, learning rates and reductions stay outside. What is
captured is the pipeline's own step, so that there is no second description of it.

A shape is captured when it first comes. Documents are padded with empty ones, and bounds on their
length rounded, so that few shapes come.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarlx.generation.decoders.stage import captured
from megarlx.model.build import ParallelModel
from megarlx.objectives.interface import Objective
from megarlx.parallel.microbatches import Microbatch, Results
from megarlx.parallel.pipeline import Pipeline

DEVICES = {"cuda"}  # where a graph can be had
OF_PART = ("tokens", "documents", "positions")  # a micro-batch's tensors beside the loss's
MOST_GRAPHS = 4  # of an objective; each holds the activations of a micro-batch


def is_small(model: ParallelModel, below: int) -> bool:
    """Whether launches are what a step waits for."""
    return model.pipeline.device.type in DEVICES and model.config.parameters() < below


def why_eager(model: ParallelModel, objective: Objective) -> str | None:
    """Why an objective's micro-batches cannot be captured; None: nothing is known against it."""
    layout, fp8 = model.mesh.layout, model.stages[0].fp8
    if layout.pp > 1:
        return f"layout.pipeline is {layout.pp}: stages wait for each other on the host"
    if layout.tp > 1:
        return f"layout.tensor is {layout.tp}: the host takes part in sums over ranks"
    if fp8 is not None:
        return f"training.fp8 is '{fp8}': Transformer Engine moves scales on between forwards"
    if not objective.fixed_shapes:
        return "its batches or its loss have shapes that depend on their data"
    return None


class CapturedMicrobatches:
    """Graphs of one objective's micro-batches."""

    def __init__(self, pipeline: Pipeline, objective: Objective) -> None:
        self.pipeline, self.objective = pipeline, objective
        self.refused: str | None = None  # why nothing more is captured
        self._graphs: dict[tuple[Any, ...], _Captured] = {}

    def prepare(self, parts: Sequence[Microbatch], normalizer: Tensor) -> str | None:
        """Captures what these parts need and is not there; returns what there is to say of it.

        Gradients are added to by the runs that warm up: this comes before they are cleared.
        """
        if self.refused is not None:
            return None
        first = not self._graphs
        new = {key: part for part in map(_padded, parts) if (key := _key(part)) not in self._graphs}
        for key, part in new.items():
            if len(self._graphs) == MOST_GRAPHS:
                self.refused = f"its micro-batches have more than {MOST_GRAPHS} shapes"
            else:
                self._capture(key, part, normalizer)
            if self.refused is not None:
                return f"{self.objective.name}: no more CUDA graphs, since {self.refused}"
        return f"{self.objective.name}: a micro-batch is one CUDA graph" if first else None

    @property
    def are_there(self) -> bool:
        return bool(self._graphs)

    def _capture(self, key: tuple[Any, ...], part: Microbatch, normalizer: Tensor) -> None:
        own, divisor = _copied(part), normalizer.clone()
        loss = partial(self.objective.fixed_shape_loss, normalizer=divisor)

        def step() -> Results:
            return self.pipeline.forward_backward([own], loss)

        try:
            step()  # what is made once may be waited for
            with waits_refused(self.pipeline.device):
                step()
            graph, results = captured(step)
        except RuntimeError as error:  # the step does something that no graph can hold
            self.refused = f"capturing failed: {str(error).strip().splitlines()[0]}"
            return
        self._graphs[key] = _Captured(graph, own, divisor, results)

    def forward_backward(self, parts: Sequence[Microbatch], normalizer: Tensor) -> Results:
        """As the pipeline's, of an objective's loss; parts without a graph run as they always do.

        Nobody is told when a gradient is complete: with the last part, all are.
        """
        total = Results()
        for part in parts:
            padded = _padded(part)
            graph = self._graphs.get(_key(padded))
            if graph is None:
                loss = partial(self.objective.loss, normalizer=normalizer)
                found = self.pipeline.forward_backward([part], loss)
            else:
                found = graph.run(padded, normalizer)
            total.losses += found.losses
            total.outputs += found.outputs
        return total


@contextmanager
def waits_refused(device: torch.device) -> Iterator[None]:
    """Inside, the host may not wait for the device: that would spoil a capture half-way."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # that it may not find all of them
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class _Captured:
    """A graph, what it reads and what it leaves."""

    graph: torch.cuda.CUDAGraph
    part: Microbatch
    normalizer: Tensor
    results: Results

    def run(self, part: Microbatch, normalizer: Tensor) -> Results:
        given = _tensors(part)
        for name, own in _tensors(self.part).items():
            own.copy_(given[name])
        self.normalizer.copy_(normalizer)
        self.graph.replay()
        return Results(  # of this run: the next one writes into the same memory
            [loss.clone() for loss in self.results.losses],
            [{name: one.clone() for name, one in of.items()} for of in self.results.outputs],
        )


def _tensors(part: Microbatch) -> dict[str, Tensor]:
    named = {one.name: getattr(part.inputs, one.name) for one in fields(part.inputs)}
    named |= {name: getattr(part, name) for name in OF_PART}
    return {name: held for name, held in named.items() if isinstance(held, Tensor)}


def _copied(part: Microbatch) -> Microbatch:
    """In memory of its own."""
    copies: dict[str, Any] = {name: held.clone() for name, held in _tensors(part).items()}
    of_part = {name: copies.pop(name) for name in OF_PART if name in copies}
    return replace(part, inputs=replace(part.inputs, **copies), **of_part)


def _key(part: Microbatch) -> tuple[Any, ...]:
    """What a graph is fixed to."""
    shapes = ((name, held.shape, held.dtype) for name, held in _tensors(part).items())
    return (*shapes, part.longest, part.inputs.sequences)


def _padded(part: Microbatch) -> Microbatch:
    """Empty documents behind the real ones, up to a power of two; rows of one length stay."""
    if part.documents is None or part.longest is None:
        return part
    tokens, ends = part.tokens.numel(), part.documents.reshape(-1)
    if (len(ends) - 1) * part.longest == tokens:
        return part
    missing = _power_of_two(len(ends)) - len(ends)
    padded = torch.cat((ends, ends[-1:].expand(missing)))
    return replace(part, documents=padded, longest=min(_power_of_two(part.longest), tokens))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
