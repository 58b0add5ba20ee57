"""The families as Hugging Face has them: data, and the look-ups in it.

What a family *is* (where its norms stand, whether it has biases) is in `FAMILIES` of
megarlx/config/model.py. Here is only what it is called there. In model space both sides have the
same tensors, one a projection, with the same shapes: nothing is transposed, fused or padded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megarlx.config.model import FAMILIES, ModelConfig
from megarlx.hf.errors import ConversionError

# {n} is the layer. The two norms of a layer are named by family.
TENSORS = {
    "embedding.weight": "model.embed_tokens.weight",
    "layers.{n}.attention.q.weight": "model.layers.{n}.self_attn.q_proj.weight",
    "layers.{n}.attention.k.weight": "model.layers.{n}.self_attn.k_proj.weight",
    "layers.{n}.attention.v.weight": "model.layers.{n}.self_attn.v_proj.weight",
    "layers.{n}.attention.q.bias": "model.layers.{n}.self_attn.q_proj.bias",
    "layers.{n}.attention.k.bias": "model.layers.{n}.self_attn.k_proj.bias",
    "layers.{n}.attention.v.bias": "model.layers.{n}.self_attn.v_proj.bias",
    "layers.{n}.attention.q_norm.weight": "model.layers.{n}.self_attn.q_norm.weight",
    "layers.{n}.attention.k_norm.weight": "model.layers.{n}.self_attn.k_norm.weight",
    "layers.{n}.attention.o.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "layers.{n}.mlp.gate.weight": "model.layers.{n}.mlp.gate_proj.weight",
    "layers.{n}.mlp.up.weight": "model.layers.{n}.mlp.up_proj.weight",
    "layers.{n}.mlp.down.weight": "model.layers.{n}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
PRE_NORMS = {
    "layers.{n}.attention_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "layers.{n}.mlp_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
}
POST_NORMS = {
    "layers.{n}.attention_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "layers.{n}.mlp_norm.weight": "model.layers.{n}.post_feedforward_layernorm.weight",
}
# Old files hold these beside the weights; they follow from the configuration.
NOT_WEIGHTS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# Our field: the key in config.json. Rotary settings are not here: they are nested, in two forms.
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "tied_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "max_sequence_length": "max_position_embeddings",
}
# What a config.json that leaves a key out means; a key without a default must be there.
DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
}
# Keys that, where they are there, must have one of these values: we have no other form of them.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "clip_qkv": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class HuggingFaceFamily:
    model_type: str
    architecture: str
    family: str  # ours
    norms: dict[str, str]
    defaults: dict[str, Any] = field(default_factory=dict)  # over DEFAULTS
    written: dict[str, Any] = field(default_factory=dict)  # in every config.json, besides the rest

    @property
    def tensors(self) -> dict[str, str]:
        return TENSORS | self.norms

    def default(self, key: str) -> Any:
        return self.defaults.get(key, DEFAULTS.get(key))


NO_BIAS = {"attention_bias": False}
HUGGING_FACE = {
    f.model_type: f
    for f in (
        HuggingFaceFamily(
            "olmo2",
            "Olmo2ForCausalLM",
            "olmo2",
            POST_NORMS,
            {"rms_norm_eps": 1e-5},
            NO_BIAS,
        ),
        HuggingFaceFamily(
            "llama",
            "LlamaForCausalLM",
            "llama3",
            PRE_NORMS,
            {},
            NO_BIAS | {"mlp_bias": False},
        ),
        HuggingFaceFamily(
            "qwen2",
            "Qwen2ForCausalLM",
            "qwen2",
            PRE_NORMS,
            {"max_position_embeddings": 32768},
            {"use_sliding_window": False},
        ),
        HuggingFaceFamily(
            "qwen3",
            "Qwen3ForCausalLM",
            "qwen3",
            PRE_NORMS,
            {"max_position_embeddings": 32768, "head_dim": 128},
            NO_BIAS | {"use_sliding_window": False},
        ),
    )
}
FORM = ("norm_position", "qk_norm", "qkv_bias")  # what makes two transformers different programs


def family_of(config: ModelConfig) -> HuggingFaceFamily:
    """By the form of the transformer: any key of a family can have been overridden."""
    form = {key: getattr(config, key) for key in FORM}
    for candidate in HUGGING_FACE.values():
        if all(FAMILIES[candidate.family][key] == value for key, value in form.items()):
            return candidate
    allowed = "; ".join(
        f"{name}: " + ", ".join(f"{key} {FAMILIES[f.family][key]}" for key in FORM)
        for name, f in HUGGING_FACE.items()
    )
    given = ", ".join(f"{key} {value}" for key, value in form.items())
    raise ConversionError(f"no Hugging Face class has this form: {given}; allowed are {allowed}")


def tensor_names(config: ModelConfig, family: HuggingFaceFamily) -> dict[str, str]:
    """Our name of every tensor of the model: the name there, in our order."""
    return dict(_names(config, family))


def _names(config: ModelConfig, family: HuggingFaceFamily) -> Iterator[tuple[str, str]]:
    for ours in config.tensor_shapes():
        layer = re.match(r"layers\.(\d+)\.", ours)
        if layer is None:
            yield ours, family.tensors[ours]
        else:
            template = ours.replace(layer.group(), "layers.{n}.", 1)
            yield ours, family.tensors[template].format(n=layer[1])
