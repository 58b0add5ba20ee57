"""A small model and prompts of many lengths to generate from, for tests of layouts."""

from __future__ import annotations

import torch

from megarlx.config.model import ModelConfig, family_config
from megarlx.generation.requests import Request


def small(family: str = "olmo2") -> ModelConfig:
    return family_config(
        family,
        vocab_size=301,
        hidden_size=20,
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=6,
        intermediate_size=36,
        init_std=0.3,
        **({"window": 7, "full_attention_every": 2} if family == "gemma3" else {}),
    )


def requests(groups: int, samples: int, shortest: int) -> list[Request]:
    """`shortest` is the least limit of new tokens."""
    generator = torch.Generator().manual_seed(4)
    return [
        Request(
            torch.randint(301, ((5 * g) % 30 + 1,), generator=generator).tolist(),
            [g * samples + s for s in range(samples)],
            shortest + g % 4,
        )
        for g in range(groups)
    ]
