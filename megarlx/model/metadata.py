"""What each local parameter is in the model that nobody holds whole.

Model space has one tensor a projection (q, k, v, o, gate, up, down, embedding, head, norms), with
no padding and no copies: the names and shapes of `ModelConfig.tensor_shapes`. A process holds
parameters that are slices of those tensors, several fused into one (megarlx/parallel/metadata.py).
Everything here is arithmetic on sizes: nothing needs a process.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarlx.config.model import ModelConfig
from megarlx.parallel.metadata import ParameterLayout, Piece


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
