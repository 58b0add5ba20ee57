"""The one player: what is answered once and what is played in turns are told the same way."""

from __future__ import annotations

import pytest
import torch
from agent_cases import model, played_both_ways, told


@pytest.mark.parametrize("number", range(30))
def test_one_turn_is_an_episode_of_one_turn(number: int) -> None:
    answered, acted, completions = played_both_ways(number, model(number % 3))
    assert [told(one) for one in answered] == [told(one) for one in acted]
    for episode, completion in zip(answered, completions, strict=True):
        made = episode.trajectory
        assert made is not None
        assert episode.sequence_id == completion.sequence_id
        assert made.reasons == (completion.finish_reason,)
        for whole, drawn in (
            (made.tokens, completion.tokens),
            (made.logprobs, completion.logprobs),
            (made.sampled_logprobs, completion.sampled_logprobs),
        ):
            assert torch.equal(whole[made.written], drawn)
        assert (made.logprobs[~made.written] == 0).all()


def test_the_cases_end_in_every_way() -> None:
    found = [one for number in range(6) for one in played_both_ways(number, model())[2]]
    assert {one.finish_reason for one in found} == {"stop", "stop_string", "length"}
