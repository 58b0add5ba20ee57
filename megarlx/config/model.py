"""The shape of the transformer, and the families it can take the form of."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import Field, model_validator

from megarlx import plug
from megarlx.choices import Served
from megarlx.config import parameters
from megarlx.config.families import PLAIN
from megarlx.config.section import LARGEST, TRUSTED, Named, Section, may_import


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

    family: Annotated[str, Named("family")] = Field(
        default="olmo2", description="Family whose form the transformer takes"
    )
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
    norm_position: Literal["pre", "post", "both"] = _from(
        "by family",
        description="Norm before attention and MLP, after them on their output, or both",
    )
    norm_plus_one: bool = _from(
        "by family", description="Whether norms multiply by 1 + weight, which then begins at 0"
    )
    qk_norm: Literal["none", "per_head", "full"] = _from(
        "by family",
        description="Norm of queries and keys: of each head, or over the whole projection",
    )
    qkv_bias: bool = _from(
        "by family", description="Whether the query, key, value projections have a bias"
    )
    activation: Literal["silu", "gelu_tanh"] = _from(
        "by family", description="Of the gate inside the MLP: SwiGLU, or GeGLU by tanh"
    )
    scaled_embedding: bool = _from(
        "by family", description="Whether embeddings are multiplied by the root of hidden_size"
    )
    tied_embeddings: bool = _from(
        "by family", description="Whether the output head is the embedding's own weight"
    )
    rope_theta: float = _from("by family", gt=0, description="Base of the rotary wavelengths")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="Llama 3's rotary scaling; absent: none"
    )
    query_scalar: float = _from(
        "head_dim", gt=0, description="Attention scores are divided by its root"
    )
    attention_cap: float = Field(
        default=0.0, ge=0, description="Scores become cap tanh(score / cap); 0: they stay"
    )
    final_cap: float = Field(
        default=0.0, ge=0, description="Logits become cap tanh(logit / cap); 0: they stay"
    )
    window: int | None = Field(
        default=None, ge=1, description="Tokens that a layer with a window sees, its own included"
    )
    full_attention_every: int = Field(
        default=1, ge=1, description="Every so many layers one sees all tokens, others a window"
    )
    window_rope_theta: float | None = Field(
        default=None, gt=0, description="rope_theta of layers with a window; absent: the same"
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
        given = values.get("family", cls.model_fields["family"].default)
        filled = {**PLAIN, **_family_values(given, complete=values.keys() >= PLAIN.keys())}
        hidden, heads = values.get("hidden_size"), values.get("heads")
        if _is_size(hidden) and _is_size(heads):
            filled["kv_heads"] = heads
            if hidden % heads == 0:
                filled["head_dim"] = hidden // heads
        else:
            # These are errors of their own; what would follow from them is not reported as well.
            filled |= {"kv_heads": 1, "head_dim": 2}
        filled |= values
        width = filled.get("head_dim")
        if not isinstance(width, int) or not 0 < width <= LARGEST:
            width = 1  # an error of its own
        return {"query_scalar": float(width)} | filled

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if self.heads % self.kv_heads:
            near = math.gcd(self.heads, self.kv_heads)
            wrong = f"is {self.kv_heads}; it must divide heads = {self.heads}, as {near} does"
            found.append(("kv_heads", wrong))
        if self.full_attention_every > 1 and self.window is None:
            every = f"full_attention_every = {self.full_attention_every}"
            found.append(("window", f"is absent; {every} gives the other layers one"))
        return found

    def window_of(self, layer: int) -> int | None:
        """Tokens that this layer sees; None: all."""
        return None if (layer + 1) % self.full_attention_every == 0 else self.window

    def rope_theta_of(self, layer: int) -> float:
        own = self.window_rope_theta if self.window_of(layer) is not None else None
        return self.rope_theta if own is None else own

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

    def local_kv_heads(self, tensor: int) -> int:
        """Key heads that a rank holds."""
        return max(self.kv_heads // tensor, 1)

    def kv_copies(self, tensor: int) -> int:
        """How many ranks hold the same key head."""
        return max(tensor // self.kv_heads, 1)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by its global name, in model space (no padding, no copies)."""
        return parameters.tensor_shapes(self)

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def non_embedding_parameters(self) -> int:
        """What multiplies every token, the head left out too: the N of 6 N tokens."""
        tables = ("embedding.weight", "head.weight")
        return sum(math.prod(s) for name, s in self.tensor_shapes().items() if name not in tables)

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward of one token: its matrix products, the head, causal attention."""
        products = self.non_embedding_parameters() + self.vocab_size * self.hidden_size
        # Scores and weighted sum are 2 products each.
        attention = self.layers * 4 * self.query_size * self.keys_seen(sequence_length)
        return 6.0 * products + 3.0 * attention

    @property
    def needs_of_attention(self) -> frozenset[Served]:
        """What every layer's attention has to serve besides shared key heads and a cache."""
        window = any(self.window_of(layer) is not None for layer in range(self.layers))
        needs: dict[Served, bool] = {"window": window, "cap": self.attention_cap > 0}
        return frozenset(name for name, needed in needs.items() if needed)

    def keys_seen(self, sequence_length: int) -> float:
        """By a token of a sequence, in the mean over tokens and layers."""
        total = 0.0
        for layer in range(self.layers):
            window = min(self.window_of(layer) or sequence_length, sequence_length)
            total += window - window * (window - 1) / (2 * sequence_length)
        return total / self.layers


def _family_values(name: Any, complete: bool) -> dict[str, Any]:
    """Of a family that there is; another name is an error of its own. One out of another run's
    configuration is not imported: there all that it says stands beside it."""
    if not isinstance(name, str) or plug.problem("family", name) is not None:
        return {}
    if may_import("family", name):
        return dict(plug.resolve("family", name).values)
    if complete:
        return {}
    raise ValueError(
        f"family is {name!r}, which is not imported for a configuration that another run made, and "
        f"keys of it are missing; allowed are {', '.join(plug.ours('family'))}"
    )


def resolved_model(values: Any) -> ModelConfig:
    """Of another run's resolved.json: nothing that it names is imported."""
    reading = TRUSTED.set(())
    try:
        return ModelConfig.model_validate(values)
    finally:
        TRUSTED.reset(reading)


def family_config(family: str, **shape: Any) -> ModelConfig:
    """A model of a named family; what `shape` gives wins over the family's value."""
    return ModelConfig.model_validate({"family": family, **shape})
