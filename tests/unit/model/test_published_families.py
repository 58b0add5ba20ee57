"""Logits equal those of the `transformers` implementation of each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import FAMILIES, small
from torch import Tensor

from megarlx.config.model import ModelConfig
from megarlx.model.transformer import Stage
from megarlx.parallel.metadata import Piece, fill_

transformers = pytest.importorskip("transformers")

NAMES = {
    "llama3": ("LlamaConfig", "LlamaForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def their_model(family: str, config: ModelConfig) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    config_name, model_name = NAMES[family]
    theirs = getattr(transformers, config_name)(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        tie_word_embeddings=config.tied_embeddings,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=512,
        attn_implementation="eager",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs.head_dim = config.head_dim
    torch.manual_seed(7)
    model = getattr(transformers, model_name)(theirs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def their_name(name: str, config: ModelConfig) -> str:
    post = config.norm_position == "post"
    parts = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in parts:
        return parts[name]
    _, index, *rest = name.split(".")
    inner = ".".join(rest)
    for ours, theirs in (
        ("attention_norm", "post_attention_layernorm" if post else "input_layernorm"),
        ("mlp_norm", "post_feedforward_layernorm" if post else "post_attention_layernorm"),
        ("attention.q_norm", "self_attn.q_norm"),
        ("attention.k_norm", "self_attn.k_norm"),
        ("attention.", "self_attn."),
        ("mlp.", "mlp."),
    ):
        if inner.startswith(ours):
            inner = theirs + inner[len(ours) :]
            break
    for part in ("q", "k", "v", "o", "gate", "up", "down"):
        inner = inner.replace(f".{part}.", f".{part}_proj.")
    return f"model.layers.{index}.{inner}"


def loaded_from(model: Any, config: ModelConfig) -> Stage:
    stage = Stage(config)
    theirs = model.state_dict()

    def tensor_of(piece: Piece) -> Tensor:
        tensor: Tensor = theirs[their_name(piece.name, config)]
        return tensor

    fill_(dict(stage.named_parameters()), stage.layouts, tensor_of)
    return stage


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_published_implementation(family: str, kv_heads: int, tied: bool) -> None:
    config = small(family, kv_heads=kv_heads, tied_embeddings=tied)
    model = their_model(family, config)
    stage = loaded_from(model, config)
    tokens = torch.randint(config.vocab_size, (3, 83))
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits
        ours = stage.logits(stage(tokens))
    assert theirs.shape[-1] == 97
    assert torch.isneginf(ours[:, 97:]).all()
    ours = ours[:, :97].view(theirs.shape)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_equals_the_published_implementation(family: str) -> None:
    config = small(family)
    model = their_model(family, config)
    assert config.parameters() == sum(p.numel() for p in model.parameters())
