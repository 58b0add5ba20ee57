"""The families: what the keys of [model] are in each, and what Hugging Face calls it.

A key given in the configuration wins over its family's value. The names of the parameters are in
parameters.py. On both sides the tensors have the same shapes: nothing is transposed or padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """A class of Hugging Face."""

    model_type: str
    architecture: str
    keys: Mapping[str, str] = field(default_factory=dict)  # ours: theirs, besides the common ones
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what a config.json may leave out
    written: Mapping[str, Any] = field(default_factory=dict)  # in every config.json, besides
    activation: str = "hidden_act"  # the key that names it


@dataclass(frozen=True)
class Family:
    """`values` are those of the keys of [model] that its members share."""

    values: Mapping[str, Any]
    published: Published | None = None


# Keys whose value every family has; all but these may be left out of `values`.
PLAIN: dict[str, Any] = {
    "norm_position": "pre",
    "norm_plus_one": False,
    "qk_norm": "none",
    "qkv_bias": False,
    "activation": "silu",
    "scaled_embedding": False,
    "tied_embeddings": False,
    "rope_theta": 500_000.0,
    "norm_eps": 1e-6,
}
NO_BIAS = {"attention_bias": False}
NO_WINDOW = {"use_sliding_window": False}

OLMO2 = Family(
    {"norm_position": "post", "qk_norm": "full"},
    Published("olmo2", "Olmo2ForCausalLM", defaults={"rms_norm_eps": 1e-5}, written=NO_BIAS),
)
LLAMA3 = Family(
    {"norm_eps": 1e-5},
    Published("llama", "LlamaForCausalLM", written=NO_BIAS | {"mlp_bias": False}),
)
QWEN2 = Family(
    {"qkv_bias": True, "tied_embeddings": True, "rope_theta": 1_000_000.0},
    Published(
        "qwen2",
        "Qwen2ForCausalLM",
        defaults={"max_position_embeddings": 32768},
        written=NO_WINDOW,
    ),
)
QWEN3 = Family(
    {"qk_norm": "per_head", "tied_embeddings": True, "rope_theta": 1_000_000.0},
    Published(
        "qwen3",
        "Qwen3ForCausalLM",
        defaults={"max_position_embeddings": 32768, "head_dim": 128},
        written=NO_BIAS | NO_WINDOW,
    ),
)
GEMMA = {
    "norm_position": "both",
    "norm_plus_one": True,
    "activation": "gelu_tanh",
    "scaled_embedding": True,
    "tied_embeddings": True,
}
GEMMA_KEYS = {"query_scalar": "query_pre_attn_scalar", "window": "sliding_window"}
GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
}
GEMMA2 = Family(
    GEMMA
    | {
        "rope_theta": 10_000.0,
        "attention_cap": 50.0,
        "final_cap": 30.0,
        "window": 4096,
        "full_attention_every": 2,
    },
    Published(
        "gemma2",
        "Gemma2ForCausalLM",
        keys=GEMMA_KEYS
        | {"attention_cap": "attn_logit_softcapping", "final_cap": "final_logit_softcapping"},
        defaults=GEMMA_DEFAULTS
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
            "max_position_embeddings": 8192,
        },
        written=NO_BIAS,
        activation="hidden_activation",
    ),
)
GEMMA3 = Family(
    GEMMA
    | {
        "qk_norm": "per_head",
        "rope_theta": 1_000_000.0,
        "window": 512,
        "window_rope_theta": 10_000.0,
        "full_attention_every": 6,
    },
    Published(
        "gemma3_text",
        "Gemma3ForCausalLM",
        keys=GEMMA_KEYS
        | {"window_rope_theta": "rope_local_base_freq", "final_cap": "final_logit_softcapping"},
        defaults=GEMMA_DEFAULTS
        | {
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "max_position_embeddings": 131_072,
        },
        written=NO_BIAS,
        activation="hidden_activation",
    ),
)
