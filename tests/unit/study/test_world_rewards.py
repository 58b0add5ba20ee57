"""A request is followed or not, and a reply that was cut off has not followed it."""

import pytest

from megarlx.rollouts.rewards.sample import Sample
from megarlx.study.world.rewards import world_behaviour


def test_a_reply_must_do_what_was_asked_and_end_by_itself() -> None:
    asked = {"behaviour": "repeat", "arguments": {"word": "please", "count": 2}}
    for completion, reason, reward in (
        ("please please", "stop", 1.0),
        ("please please", "length", 0.0),
        ("please", "stop", 0.0),
        ("", "stop", 0.0),
    ):
        sample = Sample("say please 2 times", completion, None, asked, reason)  # type: ignore[arg-type]
        assert world_behaviour([sample]) == [reward]
    with pytest.raises(ValueError, match="needed are behaviour and arguments"):
        world_behaviour([Sample("p", "c", None, {"behaviour": "repeat"})])
