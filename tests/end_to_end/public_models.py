"""Folders as a hub gives them: random weights, small, with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megarlx.data.tokenizer import ByteTokenizer
from megarlx.hf.tokenizer_files import hugging_face_tokenizer


def tiny_model(folder: Path, *, seed: int = 0, bf16: bool = False) -> None:
    import transformers

    tokenizer = ByteTokenizer()
    torch.manual_seed(seed)
    config = transformers.Olmo2Config(
        vocab_size=272,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=320,
        pad_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    model = transformers.Olmo2ForCausalLM(config)
    if bf16:
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    names = ("tokenizer.json", "tokenizer_config.json")
    for name, content in zip(names, hugging_face_tokenizer(tokenizer), strict=True):
        (folder / name).write_text(json.dumps(content))
