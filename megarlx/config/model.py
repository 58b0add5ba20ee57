"""The shape of the transformer, and the families it can take the form of."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeGuard

from pydantic import Field, model_validator

from megarlx.config.section import Section

Family = Literal["olmo2", "llama3", "qwen2", "qwen3"]

# What a family fixes. A key given in the configuration wins over its family's value.
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {
        "norm_position": "post",
        "qk_norm": "full",
        "qkv_bias": False,
        "tied_embeddings": False,
        "rope_theta": 500_000.0,
        "norm_eps": 1e-6,
    },
    "llama3": {
        "norm_position": "pre",
        "qk_norm": "none",
        "qkv_bias": False,
        "tied_embeddings": False,
        "rope_theta": 500_000.0,
        "norm_eps": 1e-5,
    },
    "qwen2": {
        "norm_position": "pre",
        "qk_norm": "none",
        "qkv_bias": True,
        "tied_embeddings": True,
        "rope_theta": 1_000_000.0,
        "norm_eps": 1e-6,
    },
    "qwen3": {
        "norm_position": "pre",
        "qk_norm": "per_head",
        "qkv_bias": False,
        "tied_embeddings": True,
        "rope_theta": 1_000_000.0,
        "norm_eps": 1e-6,
    },
}


def _from(source: str, **limits: Any) -> Any:
    """A field whose default is worked out from others, by `_fill_in` below."""
    return Field(json_schema_extra={"default": source}, **limits)


class RopeScaling(Section):
    """Llama 3's stretching of the rotary wavelengths for contexts longer than those trained on."""

    factor: float = Field(ge=1, description="How much longer the context becomes")
    low_freq_factor: float = Field(
        gt=0, description="Wavelengths above original_max_position / this are stretched in full"
    )
    high_freq_factor: float = Field(
        gt=0, description="Wavelengths below original_max_position / this are left as they are"
    )
    original_max_position: int = Field(ge=1, description="Context length before the stretching")

    def problems(self) -> list[tuple[str, str]]:
        if self.high_freq_factor > self.low_freq_factor:
            return []
        return [
            (
                "high_freq_factor",
                f"is {self.high_freq_factor}; it must be larger than low_freq_factor, "
                f"{self.low_freq_factor}",
            )
        ]


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class ModelConfig(Section):
    """The transformer. A family sets what its members share; any key can still be given."""

    family: Family = Field(default="olmo2", description="Family whose form the transformer takes")
    vocab_size: int = Field(ge=1, description="Token ids of the tokenizer, padding not counted")
    hidden_size: int = Field(ge=1, description="Width of the residual stream")
    layers: int = Field(ge=1, description="Transformer layers")
    heads: int = Field(ge=1, description="Query heads of a layer")
    kv_heads: int = _from(
        "heads",
        ge=1,
        description="Key and value heads of a layer; it divides heads",
    )
    head_dim: int = _from(
        "hidden_size / heads",
        ge=2,
        multiple_of=2,
        description="Width of one head; even, because rotary embedding turns pairs",
    )
    intermediate_size: int = Field(ge=1, description="Width inside the gated MLP")
    norm_position: Literal["pre", "post"] = _from(
        "by family", description="Norm before attention and MLP, or after them on their output"
    )
    qk_norm: Literal["none", "per_head", "full"] = _from(
        "by family",
        description="Norm of queries and keys: of each head, or over the whole projection",
    )
    qkv_bias: bool = _from(
        "by family", description="Whether the query, key, value projections have a bias"
    )
    tied_embeddings: bool = _from(
        "by family", description="Whether the output head is the embedding's own weight"
    )
    rope_theta: float = _from("by family", gt=0, description="Base of the rotary wavelengths")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="Llama 3's rotary scaling; absent: none"
    )
    norm_eps: float = _from("by family", gt=0, description="Added to the mean square inside a norm")
    init_std: float = Field(
        default=0.02, gt=0, description="Standard deviation of the initial weights"
    )
    max_sequence_length: int = Field(
        default=4096, ge=1, description="Longest sequence, in tokens, the model may be given"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Puts in what follows from the family and from other fields, wrong values left alone."""
        if not isinstance(values, dict):
            return values
        family = values.get("family", cls.model_fields["family"].default)
        known = isinstance(family, str) and family in FAMILIES
        filled = dict(FAMILIES[family if known else "olmo2"])
        hidden, heads = values.get("hidden_size"), values.get("heads")
        if _is_size(hidden) and _is_size(heads):
            filled["kv_heads"] = heads
            if hidden % heads == 0:
                filled["head_dim"] = hidden // heads
        else:
            # These are errors of their own; what would follow from them is not reported as well.
            filled |= {"kv_heads": 1, "head_dim": 2}
        return filled | values

    def problems(self) -> list[tuple[str, str]]:
        if self.heads % self.kv_heads == 0:
            return []
        return [
            (
                "kv_heads",
                f"is {self.kv_heads}; it must divide heads = {self.heads}, as "
                f"{math.gcd(self.heads, self.kv_heads)} does",
            )
        ]

    @property
    def query_size(self) -> int:
        """Width of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    @property
    def queries_per_kv_head(self) -> int:
        return self.heads // self.kv_heads

    def padded_vocab(self, tensor: int = 1) -> int:
        """Rows of embedding and head as stored: a multiple of 128 on each of `tensor` ranks."""
        tile = 128 * tensor
        return -(-self.vocab_size // tile) * tile

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by its global name, in model space (no padding, no copies)."""
        hidden, inner, q, kv = (
            self.hidden_size,
            self.intermediate_size,
            self.query_size,
            self.kv_size,
        )
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocab_size, hidden)}
        for index in range(self.layers):
            attention, mlp = f"layers.{index}.attention", f"layers.{index}.mlp"
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{attention}.{name}.weight"] = (rows, hidden)
                if self.qkv_bias:
                    shapes[f"{attention}.{name}.bias"] = (rows,)
            shapes[f"{attention}.o.weight"] = (hidden, q)
            if self.qk_norm != "none":
                full = self.qk_norm == "full"
                shapes[f"{attention}.q_norm.weight"] = (q if full else self.head_dim,)
                shapes[f"{attention}.k_norm.weight"] = (kv if full else self.head_dim,)
            shapes[f"{mlp}.gate.weight"] = (inner, hidden)
            shapes[f"{mlp}.up.weight"] = (inner, hidden)
            shapes[f"{mlp}.down.weight"] = (hidden, inner)
            shapes[f"layers.{index}.attention_norm.weight"] = (hidden,)
            shapes[f"layers.{index}.mlp_norm.weight"] = (hidden,)
        shapes["norm.weight"] = (hidden,)
        if not self.tied_embeddings:
            shapes["head.weight"] = (self.vocab_size, hidden)
        return shapes

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def non_embedding_parameters(self) -> int:
        """What multiplies every token, the head left out too: the N of 6 N tokens."""
        tables = ("embedding.weight", "head.weight")
        return sum(math.prod(s) for name, s in self.tensor_shapes().items() if name not in tables)

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward of one token: its matrix products, the head, causal attention."""
        products = self.non_embedding_parameters() + self.vocab_size * self.hidden_size
        # A token sees (S + 1) / 2 keys on average; scores and weighted sum are 2 products each.
        attention = self.layers * 4 * self.query_size * (sequence_length + 1) / 2
        return 6.0 * products + 3.0 * attention


def family_config(family: str, **shape: Any) -> ModelConfig:
    """A model of a named family; what `shape` gives wins over the family's value."""
    return ModelConfig.model_validate({"family": family, **shape})
