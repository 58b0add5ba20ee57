"""Small models in which no two dimensions are equal, so a missing transpose cannot hide."""

from __future__ import annotations

from typing import Any

from megarlx.config.model import ModelConfig, RopeScaling, family_config

FAMILIES = ("olmo2", "llama3", "qwen2", "qwen3", "gemma2", "gemma3")
# Windows shorter than the texts, and caps that are felt.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma2": {
        "window": 9,
        "attention_cap": 2.0,
        "final_cap": 3.0,
        "query_scalar": 13.0,
        "rope_theta": 10_000.0,
    },
    "gemma3": {
        "window": 9,
        "full_attention_every": 2,
        "window_rope_theta": 100.0,
        "query_scalar": 13.0,
    },
}
LLAMA_SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
)


def small(family: str, **changes: Any) -> ModelConfig:
    """heads 4 of 10 numbers: 40 is neither the hidden size 52 nor the inner size 68."""
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 52,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 10,
        "intermediate_size": 68,
        "rope_theta": 10_000.0,
        "init_std": 0.2,
    }
    if family == "llama3":
        shape["rope_scaling"] = LLAMA_SCALING
    return family_config(family, **{**shape, **OF_FAMILY.get(family, {}), **changes})
