"""Episodes in an environment that one rank of each copy of the model holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megarlx.comm.groups import Mesh
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.model import family_config
from megarlx.data.prompts import Prompt
from megarlx.data.tokenizer import WordTokenizer
from megarlx.generation.engine import Engine
from megarlx.generation.requests import SamplingSettings
from megarlx.model.build import build_model
from megarlx.rollouts.environment_game import EnvironmentGame
from megarlx.rollouts.environments.interface import built_in
from megarlx.rollouts.environments.process import BrokenEnvironment
from megarlx.rollouts.player import Player, Start
from megarlx.study.environments.demonstrations import TEMPLATE, TEMPLATE_WORDS


def episodes(layout: dict[str, int], function: str, options: dict[str, Any]) -> Any:
    mesh = Mesh.build(**layout, timeout_seconds=20.0)
    words = built_in(EnvironmentConfig(function="sokoban")).words
    tokenizer = WordTokenizer((*words, *TEMPLATE_WORDS))
    config = family_config(
        "olmo2",
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=8,
        intermediate_size=48,
        init_std=0.1,
        max_sequence_length=256,
    )
    model = build_model(config, mesh, seed=3)
    environment = EnvironmentConfig(
        function=function,
        options=options,
        max_turns=4,
        max_turn_tokens=3,
        max_episode_tokens=200,
        workers=0,
    )
    sokoban = built_in(EnvironmentConfig(function="sokoban"))
    starts = [
        Start(t, (2 * t, 2 * t + 1), Prompt("", None, {"task": sokoban.task("train", t)}))
        for t in range(6)
    ]
    mine = starts[mesh.dp.rank :: mesh.dp.size]
    sampling = SamplingSettings(stop_tokens=(tokenizer.eos_id,))
    engine = Engine.of(model, slots=8, longest=208)
    try:
        game = EnvironmentGame(environment, TEMPLATE, tokenizer, mesh)
        found = Player(lambda: engine, game, tokenizer).play(mine, sampling, 5, mesh.dp)
    except BrokenEnvironment as error:
        return str(error)
    return {
        e.sequence_id: (
            e.group,
            [(t.observation, t.action, t.reward, t.valid) for t in e.turns],
            e.success,
            None if e.trajectory is None else e.trajectory.tokens.tolist(),
        )
        for e in found
    }


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_every_rank_holds_the_episodes_of_its_copy_of_the_model(
    run: Callable[..., list[Any]], layout: dict[str, int]
) -> None:
    (alone,) = run(1, episodes, {}, "sokoban", {})
    assert len(alone) == 12
    assert all(len(e[1]) <= 4 for e in alone.values())
    ranks = run(2, episodes, layout, "sokoban", {})
    if "dp" in layout:
        assert ranks[0] | ranks[1] == alone
        return
    assert ranks[0] == ranks[1]
    assert sum(ranks[0][i] != alone[i] for i in alone) <= 1


def test_an_environment_that_cannot_be_made_stops_every_rank_with_the_reason(
    run: Callable[..., list[Any]],
) -> None:
    found = run(2, episodes, {"tp": 2}, "sokoban", {"level": "huge"})
    assert "could not start: ValueError: sokoban: level is 'huge'" in found[0]
    assert found[0] == found[1]
