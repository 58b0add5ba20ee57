"""From a configuration to an objective that distils."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megarlx.config.distill import DistillConfig
from megarlx.config.rollouts import run_and_step
from megarlx.objectives.distill import Distillation, Texts
from megarlx.rollouts.bank import conversations_of
from megarlx.rollouts.player import Player
from megarlx.rollouts.question_game import Unscored
from megarlx.rollouts.texts import KeptTexts, OwnTexts
from megarlx.run.left_out import tell_left_out
from megarlx.run.teachers import frozen_teacher

if TYPE_CHECKING:
    from megarlx.run.make_objectives import ObjectiveMaker


def distillation(maker: ObjectiveMaker, name: str, config: DistillConfig) -> Distillation:
    place = f"objectives.{name}.distill.teachers"
    teachers = [
        frozen_teacher(one, maker.config, maker.tokenizer, maker.model, place)
        for one in config.teachers
    ]
    texts = _own(maker, name, config) if config.samples else _kept(maker, name, config)
    return Distillation(name, config, maker.model, texts, teachers)


def _kept(maker: ObjectiveMaker, name: str, config: DistillConfig) -> Texts:
    assert config.rollouts is not None
    named = run_and_step(config.rollouts)
    assert named is not None  # the configuration saw to both
    found = conversations_of(*named, config.filter)
    longest = min(maker.config.model.max_sequence_length, config.tokens_per_microbatch)
    texts = KeptTexts(
        config,
        found,
        maker.template(config.template),
        maker.tokenizer,
        longest,
        maker.config.training.seed,
        name,
        maker.device,
    )
    tell_left_out(f"{name}.rollouts", texts.too_long, len(found), longest)
    return texts


def _own(maker: ObjectiveMaker, name: str, config: DistillConfig) -> Texts:
    prompts, longest = maker.questions(name, config)
    game = Unscored(config.max_completion_tokens, maker.mesh)
    player = Player(maker.generator(config, longest), game, maker.tokenizer)
    return OwnTexts(config, player, prompts, maker.mesh.dp, maker.config.training.seed)
