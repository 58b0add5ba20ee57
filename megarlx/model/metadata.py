"""What each local parameter is in the model that nobody holds whole.

The table of parameters (megarlx/config/parameters.py) put on a rank: a process holds slices of its
tensors, several fused into one parameter (megarlx/parallel/metadata.py). Everything here is
arithmetic on sizes: nothing needs a process.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarlx.config.model import ModelConfig
from megarlx.config.parameters import Parameter, local_sizes, rows_of, sizes
from megarlx.parallel.metadata import ParameterLayout, Piece


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place in a tensor-parallel group, as numbers."""

    size: int = 1
    rank: int = 0
    sequence_parallel: bool = False


def parameter_layouts(
    config: ModelConfig,
    tp: TensorParallel,
    *,
    first: int,
    last: int,
    embedding: bool,
    head: bool,
) -> dict[str, ParameterLayout]:
    """Layouts of the parameters of the layers [first, last), by local parameter name."""
    place = _Place(config, tp)
    layouts: dict[str, ParameterLayout] = {}
    for row, layer in rows_of(config, first, last, embedding=embedding, head=head):
        local = row.local.format(n=layer)
        layouts[local] = place.with_row(layouts.get(local), row, layer)
    if config.tied_embeddings and embedding != head:
        _mark_tied(layouts, embedding, place)
    return layouts


def _mark_tied(layouts: dict[str, ParameterLayout], embedding: bool, place: _Place) -> None:
    """The embedding, which the first and the last stage each hold: it counts on the first."""
    (row, layer), *_ = rows_of(place.config, 0, 0, embedding=True, head=False)
    held = place.with_row(None, row, layer, counts=embedding)
    name = row.name if embedding else "head.weight"
    layouts[name] = ParameterLayout(held.shape, held.pieces, held.weight_decay, tied=True)


class _Place:
    """A rank of tensor parallelism: which part of each tensor it holds."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        self.config, self.tp = config, tp
        self.whole, self.local = sizes(config), local_sizes(config, tp.size)
        self.copies = config.kv_copies(tp.size)

    def with_row(
        self, before: ParameterLayout | None, row: Parameter, layer: int, counts: bool = True
    ) -> ParameterLayout:
        """A local parameter with one more tensor in it, behind those that it has."""
        shape = tuple(self.whole[name] for name in row.shape)
        split = 0 if row.split is None else row.split
        rows, offset = shape[split], 0
        if row.split is not None:
            rows = self.local[row.shape[split]]
            offset = (self.tp.rank // (self.copies if row.copies == "kv_heads" else 1)) * rows
        start = 0 if before is None else before.shape[split]
        local_shape = (*shape[:split], start + rows, *shape[split + 1 :])
        size = min(max(shape[split] - offset, 0), rows)  # behind the vocabulary is padding
        pieces = () if before is None else before.pieces
        if size:
            piece = self._piece(row, row.name.format(n=layer), shape, start, offset, size, counts)
            pieces = (*pieces, piece)
        return ParameterLayout(local_shape, pieces, row.decay)

    def _piece(
        self,
        row: Parameter,
        name: str,
        shape: tuple[int, ...],
        start: int,
        offset: int,
        size: int,
        counts: bool,
    ) -> Piece:
        tp, holders = self.tp, self._holders(row)
        summed = row.copies in ("kv_heads", "heads") or (
            row.copies == "ranks" and tp.sequence_parallel
        )
        return Piece(
            name,
            shape,
            0 if row.split is None else row.split,
            start,
            offset,
            size,
            replicated_over=holders,
            sum_gradients=summed and len(holders) > 1,
            counts_in_norm=counts and holders[0] == tp.rank,
        )

    def _holders(self, row: Parameter) -> tuple[int, ...]:
        if row.copies == "no":
            return (self.tp.rank,)
        if row.copies == "kv_heads":
            begin = self.tp.rank // self.copies * self.copies
            return tuple(range(begin, begin + self.copies))
        return tuple(range(self.tp.size))
