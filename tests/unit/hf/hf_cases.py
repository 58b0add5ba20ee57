"""Published models with random weights and no two dimensions equal, saved by `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megarlx.comm.share import Share
from megarlx.hf.command import Asked, Converter

transformers = pytest.importorskip("transformers")

FAMILIES = ("olmo2", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
CLASSES = {
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {"sliding_window": 9, "query_pre_attn_scalar": 13, "layer_types": [SLIDING, FULL, SLIDING]}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        **GEMMA,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 10_000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}
LLAMA_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def published(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """4 heads of 10 numbers: 40 is neither the hidden size 52 nor the inner size 68."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if family == "llama":
        rope |= LLAMA_SCALING
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[family])
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 68,
        "tie_word_embeddings": False,
        "rms_norm_eps": 3e-6,
        "rope_parameters": rope,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    config = config_class(**{**values, **OF_FAMILY.get(family, {}), **changes})
    torch.manual_seed(7)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.to(dtype)


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, safe_serialization=True, **options)
    return folder


def convert(source: Path | str, target: Path, way: str = "hf>megarlx", **asked: Any) -> int:
    kind_from, kind_to = way.split(">")
    settings = {"files_at_once": 1, "quiet": True, **asked}
    return Converter(Asked(kind_from, kind_to, str(source), target, **settings), Share()).run()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )
