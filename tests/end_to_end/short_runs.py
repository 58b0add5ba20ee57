"""What makes runs of the configurations in configs/ short, as keys and their values in TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping

WORLD = {
    "data.options.documents": "300",
    "data.options.held_out_documents": "20",
    "data.options.prompts": "16",
    "data.options.test_questions": "8",
}
STEPS = {
    "training.sequences_per_step": "4",
    "training.sequences_per_microbatch": "2",
    "checkpoints.save_every_steps": "4",
}
MATH = {
    "evaluation.suites.0.questions": "4",
    "evaluation.suites.0.samples": "2",
    "evaluation.suites.0.max_new_tokens": "8",
}
RL = {
    "rl.prompts_per_step": "2",
    "rl.samples_per_prompt": "2",
    "rl.max_completion_tokens": "8",
    "evaluation.readiness_prompts": "2",
}
TRUNK = {
    **WORLD,
    **STEPS,
    "training.steps": "8",
    "optimizer.warmup_steps": "2",
    "logging.validation_sequences": "8",
}


def table(settings: Mapping[str, str]) -> str:
    """As TOML, for a sweep's `set`."""
    return f"{{{', '.join(f'{json.dumps(key)} = {value}' for key, value in settings.items())}}}"
