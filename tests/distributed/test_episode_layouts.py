"""Episodes on every layout: one rank asks the environment, all ranks hold the same episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from small_generation import requests, small

from megarlx.comm.groups import Mesh
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Completion, Request, SamplingSettings, TurnEnd
from megarlx.generation.turn_by_turn import TurnByTurn
from megarlx.model.build import build_model

STOPS = SamplingSettings(stop_tokens=(11, 60, 130))


def observed(turn: TurnEnd) -> list[int]:
    generator = torch.Generator().manual_seed(sum(turn.tokens) + 7 * turn.turn)
    length = (sum(turn.tokens) + turn.sequence_id) % 25 + 1
    found: list[int] = torch.randint(301, (length,), generator=generator).tolist()
    return found


class Completing(TurnByTurn):
    """Another generator: through the engine, one turn at a time."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> list[Completion]:
        engine = Engine.of(self.model, slots=self.slots, longest=self.longest)
        return engine.generate(requests, sampling, seed)


def generated(
    layout: dict[str, int], options: dict[str, Any], feed_up_to: int | None
) -> dict[str, Any]:
    """`feed_up_to` None: by the generator that asks turn by turn."""
    mesh = Mesh.build(**layout, timeout_seconds=20.0)
    model = build_model(small(), mesh, seed=3, **options)
    asked = 0

    def on_turns_end(turns: list[TurnEnd]) -> list[Sequence[int] | None]:
        nonlocal asked
        asked += len(turns)
        return [None if t.turn == 3 else observed(t) for t in turns]

    mine = requests(9, 3, shortest=5)[mesh.dp.rank :: mesh.dp.size]
    if feed_up_to is None:
        found = Completing(model, slots=12, longest=128).episodes(mine, STOPS, 5, on_turns_end)
    else:
        engine = Engine.of(model, slots=12, longest=128)
        found = engine.episodes(mine, STOPS, 5, on_turns_end, feed_up_to=feed_up_to)
    episodes = {
        t.sequence_id: (t.tokens.tolist(), t.turn.tolist(), t.reasons, t.logprobs.tolist())
        for t in found
    }
    return {"episodes": episodes, "asked": asked, "first": mesh.tp.rank == mesh.pp.rank == 0}


LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tp2": ({"tp": 2}, {}),
    "tp2-sp": ({"tp": 2}, {"sequence_parallel": True}),
    "pp2": ({"pp": 2}, {}),
    "pp3": ({"pp": 3}, {"layers_per_stage": [1, 2, 1]}),
    "pp2-interleaved": ({"pp": 2}, {"schedule": "interleaved", "virtual_stages": 2}),
    "dp2": ({"dp": 2}, {}),
    "tp2-pp2": ({"tp": 2, "pp": 2}, {}),
}


@pytest.mark.parametrize("feed_up_to", [8, 100, None])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_the_episodes_of_one_process_and_only_first_ranks_ask(
    run: Callable[..., list[Any]], name: str, feed_up_to: int | None
) -> None:
    layout, options = LAYOUTS[name]
    (alone,) = run(1, generated, {}, {}, feed_up_to or 8)
    world = 1
    for size in layout.values():
        world *= size
    ranks = run(world, generated, layout, options, feed_up_to)
    expected, together = alone["episodes"], {}
    for rank in ranks:
        for sequence_id, episode in rank["episodes"].items():
            assert together.setdefault(sequence_id, episode) == episode, "ranks of a model differ"
        turns = sum(len(episode[2]) for episode in rank["episodes"].values())
        assert rank["asked"] == (turns if rank["first"] else 0)
    assert together.keys() == expected.keys()
    differing = [i for i in expected if expected[i][:3] != together[i][:3]]
    assert len(differing) <= 0.04 * len(expected), differing  # at most 1 of 27
    for i in expected:
        if i not in differing:
            torch.testing.assert_close(
                torch.tensor(together[i][3]), torch.tensor(expected[i][3]), rtol=0, atol=2e-5
            )
    if name == "dp2" and feed_up_to is not None:
        assert together == expected, "a data-parallel split changed bits"
