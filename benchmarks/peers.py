"""Our models as other trainers have them."""

from __future__ import annotations

from typing import Any

from megarlx.config.model import ModelConfig


def olmo2_of_transformers(c: ModelConfig, end: int | None = None) -> Any:
    """With weights of its own; `end` is the token that ends a text, and fills up."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        pad_token_id=end,
        bos_token_id=None,
        eos_token_id=end,
    )
    return Olmo2ForCausalLM(config)
