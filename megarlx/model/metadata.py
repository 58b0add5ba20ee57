"""What each local parameter is in the model that nobody holds whole.

Model space has one tensor a projection (q, k, v, o, gate, up, down, embedding, head, norms), with
no padding and no copies: the names and shapes of `ModelConfig.tensor_shapes`. A process holds
parameters that are slices of those tensors, several fused into one. A `Piece` ties a range of a
parameter to a range of a tensor. Everything is arithmetic on sizes: nothing here needs a process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlx.comm import collectives
from megarlx.comm.groups import Group
from megarlx.model.config import ModelConfig


@dataclass(frozen=True)
class Piece:
    """`parameter.narrow(dim, start, size)` holds `tensor.narrow(dim, offset, size)`."""

    name: str  # of the global tensor
    global_shape: tuple[int, ...]
    dim: int  # the dimension that tensor parallelism splits (0 where it splits none)
    start: int
    offset: int
    size: int
    replicated_over: tuple[int, ...]  # tensor-parallel ranks that hold this piece, this one too
    sum_gradients: bool  # each copy's gradient is a part: the sum over the copies is the gradient
    counts_in_norm: bool  # exactly one copy does

    @property
    def is_split(self) -> bool:
        return self.size != self.global_shape[self.dim]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.global_shape[: self.dim], self.size, *self.global_shape[self.dim + 1 :])

    def of_parameter(self, parameter: Tensor) -> Tensor:
        """The piece as a view of the local parameter, or of anything of its shape."""
        return parameter.narrow(self.dim, self.start, self.size)

    def of_tensor(self, tensor: Tensor) -> Tensor:
        """The piece as a view of the global tensor."""
        return tensor.narrow(self.dim, self.offset, self.size)


@dataclass(frozen=True)
class ParameterLayout:
    """A local parameter: its pieces in order; what no piece covers is vocabulary padding."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    weight_decay: bool  # matrices yes, norms and biases no
    tied: bool = False  # first and last pipeline stage each hold it: their gradients are summed


@dataclass(frozen=True)
class TensorParallel:
    """One rank's place in a tensor-parallel group, as numbers."""

    size: int = 1
    rank: int = 0
    sequence_parallel: bool = False


def local_kv_heads(config: ModelConfig, tp: int) -> int:
    return max(config.kv_heads // tp, 1)


def kv_copies(config: ModelConfig, tp: int) -> int:
    """How many ranks hold the same key/value head."""
    return max(tp // config.kv_heads, 1)


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
    shapes = config.tensor_shapes()
    everyone = tuple(range(tp.size))
    dim, copies = config.head_dim, kv_copies(config, tp.size)
    q_size = config.heads // tp.size * dim
    kv_size = local_kv_heads(config, tp.size) * dim
    kv_begin = tp.rank // copies * copies
    kv_holders = tuple(range(kv_begin, kv_begin + copies))
    inner = config.intermediate_size // tp.size

    def piece(
        name: str,
        split: int = 0,
        start: int = 0,
        offset: int = 0,
        size: int | None = None,
        holders: tuple[int, ...] = (tp.rank,),
        partial: bool = False,
    ) -> Piece:
        shape = shapes[name]
        return Piece(
            name,
            shape,
            split,
            start,
            offset,
            shape[split] if size is None else size,
            holders,
            partial and len(holders) > 1,
            holders[0] == tp.rank,
        )

    def matrix(*pieces: Piece) -> ParameterLayout:
        rows = sum(p.size for p in pieces)
        shape = pieces[0].shape if pieces[0].dim == 1 else (rows, pieces[0].global_shape[1])
        return ParameterLayout(shape, pieces, weight_decay=True)

    def vector(*pieces: Piece) -> ParameterLayout:
        return ParameterLayout((sum(p.size for p in pieces),), pieces, weight_decay=False)

    def norm(name: str) -> ParameterLayout:
        # each rank sees its own tokens under sequence parallelism, all of them otherwise
        return vector(piece(name, holders=everyone, partial=tp.sequence_parallel))

    def qkv(prefix: str, kind: str) -> tuple[Piece, ...]:
        kv = {"offset": tp.rank // copies * kv_size, "size": kv_size, "holders": kv_holders}
        return (
            piece(f"{prefix}.q.{kind}", offset=tp.rank * q_size, size=q_size),
            piece(f"{prefix}.k.{kind}", start=q_size, partial=True, **kv),  # type: ignore[arg-type]
            piece(f"{prefix}.v.{kind}", start=q_size + kv_size, partial=True, **kv),  # type: ignore[arg-type]
        )

    def vocabulary(name: str, tied: bool, counted: bool) -> ParameterLayout:
        rows = config.padded_vocab(tp.size) // tp.size
        offset = tp.rank * rows
        size = min(max(config.vocab_size - offset, 0), rows)
        shape = shapes[name]
        held = Piece(name, shape, 0, 0, offset, size, (tp.rank,), False, counted)
        pieces = (held,) if size else ()
        return ParameterLayout((rows, shape[1]), pieces, weight_decay=True, tied=tied)

    layouts: dict[str, ParameterLayout] = {}
    tied_apart = config.tied_embeddings and embedding != head
    if embedding:
        layouts["embedding.weight"] = vocabulary("embedding.weight", tied_apart, counted=True)
    for index in range(first, last):
        layer = f"layers.{index}"
        attention, mlp = f"{layer}.attention", f"{layer}.mlp"
        layouts[f"{attention}.qkv.weight"] = matrix(*qkv(attention, "weight"))
        if config.qkv_bias:
            layouts[f"{attention}.qkv.bias"] = vector(*qkv(attention, "bias"))
        if config.qk_norm == "per_head":
            # the same weight serves every head, and a rank sees only its own heads
            for name in (f"{attention}.q_norm.weight", f"{attention}.k_norm.weight"):
                layouts[name] = vector(piece(name, holders=everyone, partial=True))
        elif config.qk_norm == "full":
            q, k, _ = qkv(attention, "weight")
            layouts[f"{attention}.q_norm.weight"] = vector(
                piece(f"{attention}.q_norm.weight", offset=q.offset, size=q.size)
            )
            layouts[f"{attention}.k_norm.weight"] = vector(
                piece(
                    f"{attention}.k_norm.weight",
                    offset=k.offset,
                    size=k.size,
                    holders=kv_holders,
                    partial=True,
                )
            )
        layouts[f"{attention}.o.weight"] = matrix(
            piece(f"{attention}.o.weight", split=1, offset=tp.rank * q_size, size=q_size)
        )
        layouts[f"{layer}.attention_norm.weight"] = norm(f"{layer}.attention_norm.weight")
        layouts[f"{mlp}.gate_up.weight"] = matrix(
            piece(f"{mlp}.gate.weight", offset=tp.rank * inner, size=inner),
            piece(f"{mlp}.up.weight", start=inner, offset=tp.rank * inner, size=inner),
        )
        layouts[f"{mlp}.down.weight"] = matrix(
            piece(f"{mlp}.down.weight", split=1, offset=tp.rank * inner, size=inner)
        )
        layouts[f"{layer}.mlp_norm.weight"] = norm(f"{layer}.mlp_norm.weight")
    if head:
        layouts["norm.weight"] = norm("norm.weight")
        if not config.tied_embeddings:
            layouts["head.weight"] = vocabulary("head.weight", tied=False, counted=True)
        elif tied_apart:
            layouts["head.weight"] = vocabulary("embedding.weight", tied=True, counted=False)
    return layouts


def sum_partial_gradients_(
    layouts: Mapping[str, ParameterLayout], gradients: Mapping[str, Tensor], group: Group
) -> None:
    """Sum the gradients of pieces that several tensor-parallel ranks hold a part of, in place.

    One all-reduce for all of them. Key/value heads are held by a few ranks only: each set of
    holders has its own places in what is sent, and leaves the other places zero, so the sum is
    exact, the same on every holder, and needs no group of its own.
    """
    if group.size == 1:
        return
    parts: list[tuple[Tensor, int, int]] = []  # the gradient, its set of holders, how many sets
    for name in sorted(gradients):
        for piece in layouts[name].pieces:
            if piece.sum_gradients:
                sets = group.size // len(piece.replicated_over)
                mine = group.rank // len(piece.replicated_over)
                parts.append((piece.of_parameter(gradients[name]), mine, sets))
    for dtype in sorted({part.dtype for part, _, _ in parts}, key=str):
        same = [p for p in parts if p[0].dtype == dtype]
        total = sum(part.numel() * sets for part, _, sets in same)
        buffer = torch.zeros(total, dtype=dtype, device=same[0][0].device)
        places, begin = [], 0
        for part, mine, sets in same:
            place = buffer[begin + mine * part.numel() :][: part.numel()].view(part.shape)
            places.append(place.copy_(part))
            begin += part.numel() * sets
        collectives.all_reduce_(buffer, group)
        for (part, _, _), place in zip(same, places, strict=True):
            part.copy_(place)


@torch.no_grad()
def fill_(
    parameters: Mapping[str, Tensor],
    layouts: Mapping[str, ParameterLayout],
    tensor_of: Callable[[Piece], Tensor],
) -> None:
    """Copy slices of global tensors into local parameters; vocabulary padding becomes zero."""
    for name, parameter in parameters.items():
        parameter.zero_()
        for piece in layouts[name].pieces:
            tensor = tensor_of(piece)
            if tuple(tensor.shape) != piece.global_shape:
                raise ValueError(
                    f"{piece.name} has shape {tuple(tensor.shape)}; the model's is "
                    f"{piece.global_shape}"
                )
            piece.of_parameter(parameter).copy_(piece.of_tensor(tensor))
