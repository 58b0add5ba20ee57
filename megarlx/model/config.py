"""The shape of a model, and the four families as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

NormPosition = Literal["pre", "post"]
QKNorm = Literal["none", "per_head", "full"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotary frequencies to contexts longer than trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor}, high_freq_factor is "
                f"{self.high_freq_factor}; allowed: 0 < low < high"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. Nothing here depends on how it is laid out over processes."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_position: NormPosition = "pre"
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    tied_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "intermediate_size",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"model.{name} is {value!r}; it must be an integer above 0")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads is {self.heads}, model.kv_heads is {self.kv_heads}; "
                "heads must be a multiple of kv_heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim is {self.head_dim}; rotary embedding needs an even head_dim"
            )
        for name, allowed in (
            ("norm_position", get_args(NormPosition)),
            ("qk_norm", get_args(QKNorm)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )

    def padded_vocab(self, tp: int = 1) -> int:
        """Rows of the embedding and the head: every rank's share is a multiple of 128."""
        tile = 128 * tp
        return -(-self.vocab_size // tile) * tile

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by its global name, in model space (no padding, no copies)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
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
        return sum(_elements(shape) for shape in self.tensor_shapes().values())

    def non_embedding_parameters(self) -> int:
        """What multiplies every token, the head left out too: the N of 6·N·tokens."""
        tables = ("embedding.weight", "head.weight")
        return sum(_elements(s) for name, s in self.tensor_shapes().items() if name not in tables)

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward of one token: its matrix products, the head, causal attention."""
        products = self.non_embedding_parameters() + self.vocab_size * self.hidden_size
        # a token sees (S+1)/2 keys on average; scores and the weighted sum are 2 products, 2 flops
        seen = (sequence_length + 1) / 2
        attention = self.layers * 2 * 2 * self.heads * self.head_dim * seen
        return 6.0 * products + 3.0 * attention


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


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


def family_config(family: str, **shape: Any) -> ModelConfig:
    """A config of a named family; anything given in `shape` overrides the family's value."""
    if family not in FAMILIES:
        raise ValueError(f"model family is {family!r}; known: {', '.join(FAMILIES)}")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(shape) - known)
    if unknown:
        raise ValueError(f"model has no field {', '.join(unknown)}; known: {', '.join(known)}")
    return ModelConfig(**{**FAMILIES[family], **shape})
