"""Small models and requests for the tests of generation, and generation from its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megarlx.config.model import ModelConfig, family_config
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, Request
from megarlx.model.transformer import Stage
from megarlx.ops import sample

FAMILIES = ("olmo2", "llama3", "qwen2", "qwen3", "gemma2", "gemma3")
GEMMA: dict[str, Any] = {"window": 9, "query_scalar": 13.0}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma2": {**GEMMA, "attention_cap": 2.0, "final_cap": 3.0},
    "gemma3": {**GEMMA, "full_attention_every": 2, "window_rope_theta": 100.0},
}


def small(family: str, **changes: Any) -> ModelConfig:
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
    return family_config(family, **{**shape, **OF_FAMILY.get(family, {}), **changes})


def small_stage(family: str = "olmo2", dtype: torch.dtype = torch.float32, **changes: Any) -> Stage:
    """Norm weights and biases away from their start, so that one that is left out shows."""
    stage = Stage(small(family, **changes), dtype=dtype).initialise_(5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return stage


def engine(stage: Stage, **options: Any) -> Engine:
    return Engine([stage], **{"slots": 32, "longest": 64, **options})


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(97, (length,), generator=generator).tolist()
    return found


def mixed_requests(groups: int, samples: int, new: int = 12) -> list[Request]:
    """Prompts of 1 to 40 tokens; sequence ids of no particular order."""
    return [
        Request(
            prompt((7 * g) % 40 + 1, g),
            [1000 - (g * samples + s) * 3 for s in range(samples)],
            new + g % 5,
        )
        for g in range(groups)
    ]


def recomputed(stage: Stage, request: Request, sequence_id: int, seed: int) -> Completion:
    """Every token from a full forward over everything before it."""
    tokens, logprobs = list(request.prompt), []
    with torch.no_grad():
        for _ in range(request.max_new_tokens):
            logits = stage.logits(stage(torch.tensor([tokens])))[-1:].float()
            keys = torch.tensor([[sequence_id, len(tokens)]])
            drawn = sample(logits, seed=seed, keys=keys, vocab_size=97)
            tokens.append(int(drawn.token))
            logprobs.append(drawn.logprob)
    new = torch.tensor(tokens[len(request.prompt) :])
    both = torch.cat(logprobs)
    return Completion(request, sequence_id, new, both, both, "length")


def same_bits(a: list[Completion], b: list[Completion]) -> bool:
    """Whether the same sequences hold the same tokens and log-probs, in whatever order."""

    def by_id(completions: list[Completion]) -> dict[int, tuple[Tensor, Tensor, Tensor, str]]:
        return {
            c.sequence_id: (c.tokens, c.logprobs, c.sampled_logprobs, c.finish_reason)
            for c in completions
        }

    one, other = by_id(a), by_id(b)
    return one.keys() == other.keys() and all(
        x[3] == y[3] and all(torch.equal(s, t) for s, t in zip(x[:3], y[:3], strict=True))
        for x, y in ((one[i], other[i]) for i in one)
    )


def share_that_differs(a: list[Completion], b: list[Completion]) -> float:
    tokens = {c.sequence_id: c.tokens for c in b}
    return sum(not torch.equal(c.tokens, tokens[c.sequence_id]) for c in a) / len(a)
