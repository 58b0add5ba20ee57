"""Small students with frozen teachers, on their own samples or on conversations that were kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_cases import TEMPLATE, WORDS, model, prompts

from megarlx.config.distill import DistillConfig
from megarlx.data.conversations import Conversation, Turn
from megarlx.data.prompts import PromptData
from megarlx.data.tokenizer import WordTokenizer
from megarlx.generation.engine import Engine
from megarlx.model.build import ParallelModel
from megarlx.objectives.distill import Distillation, Frozen, Texts
from megarlx.rollouts.player import Player
from megarlx.rollouts.question_game import Unscored
from megarlx.rollouts.texts import KeptTexts, OwnTexts

TOKENIZER = WordTokenizer(WORDS)


def config(**changes: Any) -> DistillConfig:
    given = {
        "teachers": [f"t{seed}@1" for seed in (11, 12)],
        "prompts_per_rollout": 4,
        "samples_per_prompt": 2,
        "rollout_every_steps": 3,
        "max_completion_tokens": 6,
        "tokens_per_microbatch": 64,
        "slots": 32,
        **changes,
    }
    return DistillConfig.model_validate(given)


def distillation(
    given: DistillConfig,
    student: ParallelModel,
    seeds: Sequence[int] = (11, 12),
    name: str = "distill",
) -> Distillation:
    """The teachers are models of other seeds, in the student's layout."""
    mesh, dtype = student.mesh, student.pipeline.dtype
    teachers = [
        Frozen(
            f"t{seed}@1",
            f"digest of {seed}",
            model(seed, dtype, mesh).data_parallel.shard_of_weights().detach().clone(),
        )
        for seed in seeds
    ]
    return Distillation(name, given, student, texts(given, student), teachers)


def texts(given: DistillConfig, student: ParallelModel) -> Texts:
    if not given.samples:
        made = [
            Conversation((Turn("user", one.question), Turn("assistant", one.question)))
            for one in prompts()
        ]
        device = student.pipeline.device
        return KeptTexts(given, made, TEMPLATE, TOKENIZER, 64, 5, "distill", device)
    engine = Engine.of(student, slots=given.slots, longest=32, detokenize=TOKENIZER.decode_sampled)
    game = Unscored(given.max_completion_tokens, student.mesh)
    data = PromptData(prompts(), TEMPLATE, TOKENIZER, 5, name="distill")
    return OwnTexts(given, Player(lambda: engine, game, TOKENIZER), data, student.mesh.dp, 5)
