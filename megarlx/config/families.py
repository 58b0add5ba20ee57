"""The families: the keys of [model] in each, what Hugging Face calls it, what layers are built of.

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


# Of the gate inside the MLP: what Hugging Face calls it, and the function that computes it.
ACTIVATIONS = {
    "silu": (("silu", "swish"), "ops.elementwise.swiglu"),
    "gelu_tanh": (("gelu_pytorch_tanh",), "ops.elementwise.geglu"),
}

TYPE_NAMES = ("float32", "float64", "bfloat16", "float16")  # of the tensors in a folder of theirs

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


def listed(**classes: str) -> frozenset[str]:
    """Features (megarlx/model/features.py) from `Class="attribute=value other=this|that"`."""
    return frozenset(
        f"{name}.{attribute}={value}"
        for name, text in classes.items()
        for attribute, _, values in (part.partition("=") for part in text.split())
        for value in values.split("|")
    )


# The layers of a transformer with SwiGLU, RMSNorm before or after, and plain causal attention.
PLAIN_LAYERS = listed(
    Stage="backend=model.layers_torch fp8=None recompute=none|selective|full radians=dict "
    "has_embedding=True|False has_head=True|False sequence_parallel=False group=comm.groups.Group "
    "embedding_scale=None final_cap=None embedding=model.layers_torch.VocabEmbedding "
    "head=model.layers_torch.VocabEmbedding norm=model.layers_torch.RMSNorm "
    "layers=model.transformer_layer.Layer",
    Layer="norm_position=pre|post rope_theta=number attention=model.transformer_layer.Attention "
    "mlp=model.transformer_layer.MLP attention_norm=model.layers_torch.RMSNorm "
    "mlp_norm=model.layers_torch.RMSNorm",
    Attention="heads=number kv_heads=number head_dim=number qk_norm=none|per_head|full "
    "spans_ranks=False spanned=tuple group=comm.groups.Group rotate=model.rope.rotate "
    "recompute=None|model.layers_torch.recompute qkv=model.layers_torch.ColumnLinear "
    "o=model.layers_torch.RowLinear q_norm=model.layers_torch.RMSNorm "
    "k_norm=model.layers_torch.RMSNorm core=model.core_attention.CoreAttention",
    CoreAttention="attend=model.attention.attention form.scale=number form.window=None "
    "form.cap=None kind=auto|flash|sdpa|blocks kernel=auto|flash|sdpa|blocks packed=None",
    MLP="activation=ops.elementwise.swiglu recompute=True|False "
    "gate_up=model.layers_torch.ColumnLinear down=model.layers_torch.RowLinear",
    RMSNorm="eps=number plus_one=False sequence_parallel=False weight=Parameter",
    ColumnLinear="weight=Parameter bias=Parameter|None group=comm.groups.Group "
    "sequence_parallel=False delayed=None|ops.delayed_linear.DelayedGradients",
    RowLinear="weight=Parameter bias=None group=comm.groups.Group sequence_parallel=False "
    "delayed=None|ops.delayed_linear.DelayedGradients",
    VocabEmbedding="weight=Parameter group=comm.groups.Group sequence_parallel=False",
)


# The same layers of Transformer Engine, and its attention beside either; not what is inside them.
_TE = "model.layers_te."
TE_LAYERS = listed(
    Stage=f"backend=model.layers_te norm={_TE}RMSNorm",
    Layer=f"attention_norm={_TE}RMSNorm mlp_norm={_TE}RMSNorm",
    Attention=f"recompute={_TE}recompute qkv={_TE}ColumnLinear o={_TE}RowLinear "
    f"q_norm={_TE}RMSNorm k_norm={_TE}RMSNorm",
    CoreAttention="kind=cudnn packed=model.attention_te.CudnnAttention",
    MLP=f"gate_up={_TE}ColumnLinear down={_TE}RowLinear",
)


# And what Gemma 2 and 3 have besides.
WINDOWS_AND_CAPS = listed(
    Stage="embedding_scale=number final_cap=number",
    Layer="norm_position=both attention_out_norm=model.layers_torch.RMSNorm "
    "mlp_out_norm=model.layers_torch.RMSNorm",
    CoreAttention="form.window=number form.cap=number",
    MLP="activation=" + "|".join(function for _, function in ACTIVATIONS.values()),
    RMSNorm="plus_one=True",
)
# All that ships, as `features_of` builds it.
ON_NO_DEVICE = (
    PLAIN_LAYERS | WINDOWS_AND_CAPS | listed(Stage="device=meta dtype=float32 splits_heads=False")
)
