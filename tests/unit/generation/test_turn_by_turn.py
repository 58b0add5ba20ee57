"""A generator that only completes prompts plays the episodes of the engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from generation_cases import mixed_requests, small
from test_episodes import turns_of

from megarlx.comm.groups import Mesh
from megarlx.generation.engine import Engine
from megarlx.generation.interface import Generator, generator_of
from megarlx.generation.requests import Completion, Request, SamplingSettings
from megarlx.generation.turn_by_turn import TurnByTurn
from megarlx.model.build import build_model

MODEL = build_model(
    small("olmo2", max_sequence_length=256), Mesh.alone(), seed=3, dtype=torch.float64
)


class Completing(TurnByTurn):
    """Through the engine, one turn at a time."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, seed: int
    ) -> list[Completion]:
        engine = Engine.of(self.model, slots=self.slots, longest=self.longest, one_width=True)
        return engine.generate(requests, sampling, seed)


def both(longest: int = 160) -> list[Generator]:
    names = ("engine", f"{__name__}:Completing")
    return [generator_of(name, MODEL, slots=7, longest=longest) for name in names]


@pytest.mark.parametrize("max_tokens", [160, 70])  # 70: some episodes are full
@pytest.mark.parametrize("turns", [1, 4, 9])
def test_turns_asked_one_by_one_are_the_episodes_of_the_engine(turns: int, max_tokens: int) -> None:
    wanted = mixed_requests(6, 3, new=7)
    settings = SamplingSettings(stop_tokens=(11, 60, 71), temperature=0.9)
    whole, asked = (
        one.episodes(wanted, settings, 8, turns_of(turns), max_tokens=max_tokens) for one in both()
    )
    assert [t.sequence_id for t in whole] == [t.sequence_id for t in asked]
    for one, other in zip(whole, asked, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.turn, other.turn)
        assert (one.request, one.reasons, one.full) == (other.request, other.reasons, other.full)
        for name in ("logprobs", "sampled_logprobs"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert any(one.full for one in whole) == (turns > 4 or (turns > 1 and max_tokens == 70))


def test_without_an_answer_and_streamed_it_gives_the_completions_of_the_engine() -> None:
    wanted, settings = mixed_requests(4, 3), SamplingSettings(stop_tokens=(11, 60))
    engine, asked = both()
    expected = engine.generate(wanted, settings, 3)
    for one, other in zip(expected, asked.episodes(wanted, settings, 3), strict=True):
        assert torch.equal(one.tokens, other.completion.tokens)
        assert one.finish_reason == other.completion.finish_reason
    streams = [sorted(one.stream(wanted, settings, 3), key=order) for one in (engine, asked)]
    for mine, other in zip(*streams, strict=True):
        assert (mine.token, mine.finish_reason) == (other.token, other.finish_reason)
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-5)


def order(new: object) -> int:
    return new.sequence_id  # type: ignore[attr-defined,no-any-return]
