"""A small configuration whose choices are left to the machine."""

from __future__ import annotations

from typing import Any

from megarlx.config import Config


def config(*, beside: dict[str, Any] | None = None, **training: object) -> Config:
    return Config.model_validate(
        {
            "model": {
                "vocab_size": 96,
                "hidden_size": 128,
                "layers": 3,
                "heads": 2,
                "intermediate_size": 80,
                "max_sequence_length": 32,
            },
            "training": {"steps": 5, "sequence_length": 16, **training},
            **(beside or {}),
        }
    )
