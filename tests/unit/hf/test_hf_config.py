"""config.json and ModelConfig say the same thing in both directions, or the reading refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hf_cases import CLASSES, FAMILIES, published, transformers

from megarlx.config.model import ModelConfig, RopeScaling, family_config
from megarlx.hf.config_map import hugging_face_config, model_config
from megarlx.hf.errors import ConversionError
from megarlx.hf.families import families, published_as

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 52,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 10,
    "intermediate_size": 68,
    "norm_eps": 3e-6,
    "rope_theta": 12_345.0,
    "init_std": 0.03,
    "max_sequence_length": 777,
}
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
)


def of(family: str, **changes: Any) -> ModelConfig:
    return family_config(families()[family][0], **{**SHAPE, **changes})


@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_gives_the_same_config(
    family: str, tied: bool, scaling: RopeScaling | None
) -> None:
    config = of(family, tied_embeddings=tied, rope_scaling=scaling)
    assert published_as(config).model_type == family
    written = json.loads(json.dumps(hugging_face_config(config, "float32")))
    assert model_config(written, "here") == config
    # The older form alone, and the newer form alone.
    newer = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    older = {k: v for k, v in written.items() if k != "rope_parameters"}
    assert model_config(newer, "here") == model_config(older, "here") == config


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_means_what_transformers_takes_it_for(family: str) -> None:
    least = {
        "model_type": family,
        "vocab_size": 97,
        "hidden_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 68,
    }
    ours = model_config(least, "here")
    theirs = getattr(transformers, CLASSES[family][0])(**least)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.max_sequence_length == theirs.max_position_embeddings
    assert ours.init_std == theirs.initializer_range
    rope = theirs.rope_parameters
    of_windows = rope.get("sliding_attention", {"rope_theta": None})
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert ours.window_rope_theta == of_windows["rope_theta"]
    assert [ours.window_of(layer) for layer in range(3)] == [
        theirs.sliding_window if kind == "sliding_attention" else None
        for kind in getattr(theirs, "layer_types", None) or ["full_attention"] * 3
    ]
    assert ours.query_scalar == getattr(theirs, "query_pre_attn_scalar", ours.head_dim)
    for cap, their_cap in (
        (ours.attention_cap, "attn_logit_softcapping"),
        (ours.final_cap, "final_logit_softcapping"),
    ):
        assert cap == (getattr(theirs, their_cap, None) or 0.0)
    assert ours.head_dim == getattr(theirs, "head_dim", 14)


def test_a_model_takes_the_class_of_its_form_whatever_its_family_is_called() -> None:
    assert published_as(of("llama", qkv_bias=True)).model_type == "qwen2"
    assert published_as(of("olmo2", norm_position="pre", qk_norm="per_head")).model_type == "qwen3"
    with pytest.raises(ConversionError, match=r"no Hugging Face class has this form.*post"):
        published_as(of("olmo2", qk_norm="none"))


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type is 'mixtral'.*allowed are olmo2, llama"),
        ("llama", {"model_type": None}, "model_type is None"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequence"),
        ("llama", {"attention_bias": True}, "attention_bias is True; allowed is false"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed are \"silu\""),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "type 'yarn'; allowed are default"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "the rotary scaling lacks factor"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("olmo2", {"num_key_value_heads": 3}, "kv_heads"),
        ("olmo2", {"vocab_size": "many"}, "vocab_size.*'many'"),
        ("olmo2", {"num_hidden_layers": None}, "num_hidden_layers"),
        ("olmo2", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_has_no_place_in_our_model_is_refused_by_name(
    family: str, change: dict[str, Any], said: str
) -> None:
    content = {**published(family).config.to_dict(), "architectures": [CLASSES[family][1]]}
    model_config(content, "here")
    with pytest.raises(ConversionError, match=said):
        model_config({**content, **change}, "here")
