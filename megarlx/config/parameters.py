"""Every parameter of a model, told once: what it is called, its shape, how ranks share it.

Shapes, counts, layouts over tensor parallelism, bytes and Hugging Face's names follow from here.
Sizes are named by what they count, so that what a rank holds of them follows too:

    hidden, head_dim    the same on every rank
    query               the query heads' numbers, split by heads
    key                 the key heads' numbers, split by heads; where there are fewer heads than
                        ranks, several ranks hold the same ones
    inner               the width inside the MLP, split
    vocabulary          rows of the embedding, padded to whole tiles and split
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megarlx.config.model import ModelConfig

# Who holds the same numbers, and whose gradients are then summed:
#   no        each rank has its own
#   kv_heads  the ranks of a key head; each sees its own query heads, so gradients are always summed
#   heads     all ranks; each applies it to its own heads, so gradients are always summed
#   ranks     all ranks; gradients are summed where each sees its own tokens (sequence parallelism)
Copies = Literal["no", "kv_heads", "heads", "ranks"]


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model: no padding, no copies, nothing fused. {n} is the layer."""

    name: str
    shape: tuple[str, ...]
    published: str  # in a checkpoint of Hugging Face
    fused: str = ""  # the local parameter that it is a part of, in order; absent: it is one itself
    split: int | None = None  # the dimension that tensor parallelism splits
    copies: Copies = "no"
    decay: bool = True
    only: tuple[str, tuple[Any, ...]] | None = None  # a key of [model], and the values with it

    @property
    def local(self) -> str:
        return self.fused or self.name

    def belongs_to(self, config: ModelConfig) -> bool:
        return self.only is None or getattr(config, self.only[0]) in self.only[1]


def _of_layer(name: str, shape: tuple[str, ...], published: str, **rest: Any) -> Parameter:
    if "fused" in rest:
        rest["fused"] = f"layers.{{n}}.{rest['fused']}"
    return Parameter(f"layers.{{n}}.{name}", shape, f"model.layers.{{n}}.{published}", **rest)


def _qkv(kind: str, **rest: Any) -> tuple[Parameter, ...]:
    across = ("hidden",) if kind == "weight" else ()
    return tuple(
        _of_layer(
            f"attention.{name}.{kind}",
            (size, *across),
            f"self_attn.{name}_proj.{kind}",
            fused=f"attention.qkv.{kind}",
            split=0,
            copies=copies,
            **rest,
        )
        for name, size, copies in (
            ("q", "query", "no"),
            ("k", "key", "kv_heads"),
            ("v", "key", "kv_heads"),
        )
    )


def _norm(name: str, published: str, *positions: str) -> Parameter:
    only = ("norm_position", positions)
    return _of_layer(
        f"{name}.weight",
        ("hidden",),
        f"{published}.weight",
        copies="ranks",
        decay=False,
        only=only,
    )


def _qk_norm(name: str, size: str, copies: Copies) -> tuple[Parameter, ...]:
    """Over the whole projection, split with it, or the same for every head."""
    place = (f"attention.{name}_norm.weight", f"self_attn.{name}_norm.weight")
    return (
        _of_layer(
            place[0],
            (size,),
            place[1],
            split=0,
            copies=copies,
            decay=False,
            only=("qk_norm", ("full",)),
        ),
        _of_layer(
            place[0],
            ("head_dim",),
            place[1],
            copies="heads",
            decay=False,
            only=("qk_norm", ("per_head",)),
        ),
    )


def _gate_or_up(name: str) -> Parameter:
    return _of_layer(
        f"mlp.{name}.weight",
        ("inner", "hidden"),
        f"mlp.{name}_proj.weight",
        fused="mlp.gate_up.weight",
        split=0,
    )


FIRST = (
    Parameter("embedding.weight", ("vocabulary", "hidden"), "model.embed_tokens.weight", split=0),
)
# In the order of a layer's modules.
LAYER = (
    *_qkv("weight"),
    *_qkv("bias", decay=False, only=("qkv_bias", (True,))),
    _of_layer("attention.o.weight", ("hidden", "query"), "self_attn.o_proj.weight", split=1),
    *_qk_norm("q", "query", "no"),
    *_qk_norm("k", "key", "kv_heads"),
    _gate_or_up("gate"),
    _gate_or_up("up"),
    _of_layer("mlp.down.weight", ("hidden", "inner"), "mlp.down_proj.weight", split=1),
    _norm("attention_norm", "input_layernorm", "pre", "both"),
    _norm("attention_norm", "post_attention_layernorm", "post"),
    _norm("mlp_norm", "post_attention_layernorm", "pre"),
    _norm("mlp_norm", "post_feedforward_layernorm", "post"),
    _norm("mlp_norm", "pre_feedforward_layernorm", "both"),
    _norm("attention_out_norm", "post_attention_layernorm", "both"),
    _norm("mlp_out_norm", "post_feedforward_layernorm", "both"),
)
LAST = (
    Parameter("norm.weight", ("hidden",), "model.norm.weight", copies="ranks", decay=False),
    Parameter(
        "head.weight",
        ("vocabulary", "hidden"),
        "lm_head.weight",
        split=0,
        only=("tied_embeddings", (False,)),
    ),
)


def table(config: ModelConfig) -> tuple[Parameter, ...]:
    """The rows of this model, a layer's once."""
    return tuple(row for row in (*FIRST, *LAYER, *LAST) if row.belongs_to(config))


def rows_of(
    config: ModelConfig, first: int, last: int, *, embedding: bool, head: bool
) -> Iterator[tuple[Parameter, int]]:
    """(row, layer) of the layers [first, last), and of what stands at the ends, in order."""
    rows = [row for row in LAYER if row.belongs_to(config)]
    if embedding:
        yield from ((row, -1) for row in FIRST)
    for layer in range(first, last):
        yield from ((row, layer) for row in rows)
    if head:
        yield from ((row, -1) for row in LAST if row.belongs_to(config))


def sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "hidden": config.hidden_size,
        "head_dim": config.head_dim,
        "query": config.heads * config.head_dim,
        "key": config.kv_heads * config.head_dim,
        "inner": config.intermediate_size,
        "vocabulary": config.vocab_size,
    }


def local_sizes(config: ModelConfig, tp: int) -> dict[str, int]:
    """Of what tensor parallelism splits: what a rank holds of it."""
    return {
        "query": config.heads // tp * config.head_dim,
        "key": config.local_kv_heads(tp) * config.head_dim,
        "inner": config.intermediate_size // tp,
        "vocabulary": config.padded_vocab(tp) // tp,
    }


def _named(config: ModelConfig) -> Iterator[tuple[Parameter, int]]:
    return rows_of(config, 0, config.layers, embedding=True, head=True)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its name."""
    size = sizes(config)
    return {
        row.name.format(n=layer): tuple(size[name] for name in row.shape)
        for row, layer in _named(config)
    }


def published_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every tensor of the model: Hugging Face's, in our order."""
    return {
        row.name.format(n=layer): row.published.format(n=layer) for row, layer in _named(config)
    }
