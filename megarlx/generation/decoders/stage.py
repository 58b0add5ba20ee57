"""One token a row through `Stage.forward` and its cache: whatever its layers are, on any device.

On CUDA the step is captured once for each width as a graph: all that changes between steps lies in
tensors that the graph reads, flash-attn takes the lengths of the slots from the device, and one
launch runs the layers of the stage.

Letters: W rows of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from megarlx.generation.rows import Rows
from megarlx.model.documents import Documents
from megarlx.model.kv_cache import CacheStep, KVCache
from megarlx.model.transformer import Stage


class StageDecoder:
    """A decoder (interface.py) over the model's own layers."""

    implements: ClassVar[frozenset[str] | None] = None
    pads: ClassVar[bool] = True

    def __init__(self, stage: Stage, cache: KVCache, most_rows: int) -> None:
        self.stage, self.cache = stage, cache
        some = next(stage.parameters())
        split = stage.group.size if stage.sequence_parallel else 1
        self.split, self.device = split, some.device
        self.places = cache.table.longest
        self._hidden = torch.zeros(
            most_rows // split, stage.config.hidden_size, dtype=some.dtype, device=some.device
        )
        self._documents: dict[int, Documents] = {}
        self._graphs: dict[tuple[Rows, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._normed: Tensor | None = None

    def begin(self) -> None:
        """Before a generation: nothing is kept of the weights."""

    def hidden(self, width: int) -> Tensor:
        return self._hidden[: width // self.split]

    def forward(self, rows: Rows, width: int) -> Tensor:
        if self.device.type == "cuda":
            out = self._replayed(rows, width)
        else:
            longest = int(rows.host_positions[: rows.live].max(initial=0)) + 1
            out = self._layers(rows, width, longest)
        if self.stage.has_head:
            self._normed = out  # the last stage norms its output by itself
        else:
            self.hidden(width).copy_(out)
        return out

    def logits(self, width: int) -> Tensor:
        assert self._normed is not None
        return self.stage.logits(self._normed)

    def _layers(self, rows: Rows, width: int, span: int) -> Tensor:
        if width not in self._documents:
            self._documents[width] = Documents.rows(width, 1, self.device)
        step = CacheStep(
            self.cache,
            self._documents[width],
            rows.slots[:width],
            rows.positions[:width],
            span,
        )
        inputs = rows.tokens[:width] if self.stage.has_embedding else self.hidden(width)
        out: Tensor = self.stage(inputs, cache=step)
        return out

    def _replayed(self, rows: Rows, width: int) -> Tensor:
        """The rows' tensors are the graph's inputs, so each set of rows has its own graphs."""
        key = (rows, width)
        if key not in self._graphs:
            self._graphs[key] = captured(lambda: self._layers(rows, width, self.places))
        graph, out = self._graphs[key]
        graph.replay()
        return out


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Writes to the cache are repeated by the warm-up: the same values at the same places.

    What other threads do meanwhile (a checkpoint copied to the host) must not break the capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step()
    return graph, out
