"""Small jobs for the tests of planning."""

from __future__ import annotations

from typing import Any

from megarlx.config.model import ModelConfig, family_config
from megarlx.planning.job import Job


def olmo2() -> ModelConfig:
    return family_config(
        "olmo2", vocab_size=1000, hidden_size=128, layers=6, heads=4, intermediate_size=384
    )


def llama3() -> ModelConfig:
    return family_config(
        "llama3",
        vocab_size=2000,
        hidden_size=192,
        layers=4,
        heads=6,
        kv_heads=2,
        intermediate_size=512,
    )


def qwen3() -> ModelConfig:
    return family_config(
        "qwen3",
        vocab_size=3000,
        hidden_size=128,
        layers=8,
        heads=8,
        kv_heads=2,
        head_dim=32,
        intermediate_size=320,
    )


def gemma3() -> ModelConfig:
    return family_config(
        "gemma3",
        vocab_size=1000,
        hidden_size=128,
        layers=6,
        heads=4,
        kv_heads=2,
        intermediate_size=384,
        window=24,
        full_attention_every=3,
    )


def seventy_billion() -> ModelConfig:
    return family_config(
        "olmo2",
        vocab_size=100_278,
        hidden_size=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        intermediate_size=28_672,
    )


def cpu_job(model: ModelConfig, **changes: Any) -> Job:
    """On a CPU in fp32, as it is measured here."""
    batch = {"sequences_per_step": 8, "sequences_per_microbatch": 4, "sequence_length": 128}
    job = Job(model, **{**batch, "precision": "fp32", "on_gpu": False, **changes})
    job.check()
    return job
