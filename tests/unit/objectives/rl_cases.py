"""A tiny policy on a vocabulary of words, and what its rollouts are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megarlx.comm.groups import Mesh
from megarlx.config.model import family_config
from megarlx.config.objectives import RlConfig
from megarlx.data.conversations import Frames
from megarlx.data.prompts import Prompt, PromptData
from megarlx.data.tokenizer import WordTokenizer
from megarlx.generation.engine import Engine
from megarlx.model.build import ParallelModel, build_model
from megarlx.objectives.policy import Reinforcement
from megarlx.rollouts.player import Player
from megarlx.rollouts.question_game import QuestionGame
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rewards.sample import Sample
from megarlx.rollouts.rollout import Sampler
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

WORDS = [*["question", ":", "answer", "####"], *(f"w{i}" for i in range(20))]
VOCABULARY = 29  # more than the tokenizer's 25: the model can say what no word stands for
LONGEST_COMPLETION = 9
TEMPLATE = Frames("question : {content} answer :")

# Rewards, named as this module's functions: a worker process would import them.


def early_word(samples: list[Sample]) -> list[float]:
    """Something that every sample has another amount of: how many of its words are below w10."""
    early = {f"w{i}" for i in range(10)}
    return [sum(word in early for word in s.completion.split()) / 5 for s in samples]


def dull_for_some(samples: list[Sample]) -> list[float]:
    """No group of a prompt with `dull` has anything to teach."""
    values = early_word(samples)
    return [
        0.5 if sample.metadata["dull"] else value + 1e-3 * at
        for at, (sample, value) in enumerate(zip(samples, values, strict=True))
    ]


def always_equal(samples: list[Sample]) -> list[float]:
    return [1.0] * len(samples)


def prompts(count: int = 11, dull: Sequence[int] = ()) -> list[Prompt]:
    """Of 1 to 4 words."""
    return [
        Prompt(
            " ".join(f"w{(3 * i + j) % 20}" for j in range(1 + i % 4)),
            f"w{i}",
            {"dull": i in dull, "number": i},
        )
        for i in range(count)
    ]


def config(reward: str = "rl_cases:early_word", **changes: Any) -> RlConfig:
    return RlConfig.model_validate(
        {
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_completion_tokens": LONGEST_COMPLETION,
            "tokens_per_microbatch": 64,
            "slots": 32,
            "rewards": [{"function": reward, "workers": 0}],
            **changes,
        }
    )


def model(
    seed: int = 3, dtype: torch.dtype = torch.float32, mesh: Mesh | None = None, **options: Any
) -> ParallelModel:
    shape = family_config(
        "olmo2",
        vocab_size=VOCABULARY,
        hidden_size=24,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=14,
        intermediate_size=40,
        init_std=0.2,
        max_sequence_length=64,
    )
    mesh = mesh or Mesh.alone()
    return build_model(shape, mesh, seed=seed, dtype=dtype, bucket_elements=2000, **options)


def reinforcement(
    given: RlConfig,
    policy: ParallelModel,
    *,
    questions: Sequence[Prompt] | None = None,
    name: str = "rl",
    seed: int = 5,
) -> Reinforcement:
    tokenizer = WordTokenizer(WORDS)
    engine = Engine.of(policy, slots=given.slots, longest=32, detokenize=tokenizer.decode_sampled)
    drawn = {"by_difficulty": given.by_difficulty, "name": name}
    data = PromptData(questions or prompts(), TEMPLATE, tokenizer, seed, **drawn)
    rewards = Rewards(given.rewards, given.reward_failures_allowed)
    game = QuestionGame(rewards, given.max_completion_tokens, policy.mesh)
    sampler = Sampler(given, Player(lambda: engine, game, tokenizer), data, policy.mesh.dp, seed)
    return Reinforcement(name, given, policy, sampler)


def trainer_of(
    one: Reinforcement, *, lr: float = 1e-2, adam: UpdateSettings | None = None
) -> Trainer:
    member = TrainedObjective(one, adam or UpdateSettings(weight_decay=0.0), lambda step: lr)
    return Trainer(one.model, [TrainingStage([member], combine="single")])
