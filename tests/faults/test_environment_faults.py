"""An environment that misbehaves loses its episode, and no other."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megarlx.config.environment import EnvironmentConfig
from megarlx.rollouts.environments.process import (
    Answer,
    BrokenEnvironment,
    EnvironmentPool,
    Failure,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "rollouts"))
HERE = "misbehaving_environments"


@contextmanager
def pool(name: str = "Obedient", **rest: Any) -> Iterator[EnvironmentPool]:
    limits = {"time_limit_seconds": 1.0, "memory_limit_mb": 4096, "episodes_per_call": 4}
    made = EnvironmentPool(EnvironmentConfig(function=f"{HERE}:{name}", **{**limits, **rest}))
    try:
        yield made
    finally:
        made.close()


def starts(count: int) -> dict[int, tuple[dict[str, Any], int]]:
    return {number: ({"name": f"n{number}", "reward": 2.0}, number) for number in range(count)}


BAD = {
    "hang": "timeout", "crash": "crash", "exit": "crash", "raise": "error", "none": "wrong_shape",
    "bytes": "wrong_shape", "text reward": "wrong_shape", "nan": "not_finite",
    "list": "wrong_shape", "long": "too_long", "hoard": "error", "huge": "too_large",
    "beyond": "not_finite", "digits": "wrong_shape", "flood": "too_long",
}  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_step_loses_its_episode_only_and_the_others_go_on_where_they_were(
    workers: int,
) -> None:
    count = 3 * len(BAD)
    with pool(workers=workers) as made:
        begun = made.reset(starts(count))
        assert begun == {n: Answer(f"task n{n}") for n in range(count)}
        made.step({n: f"a{n}" for n in range(count)})
        bad = dict(zip(range(1, count, 3), BAD, strict=True))
        second = made.step({n: bad.get(n, f"b{n}") for n in range(count)})
        third = made.step({n: "c" for n in range(count) if n not in bad})
    assert {bad[n]: second[n].kind for n in bad} == BAD  # type: ignore[union-attr]
    for n in range(count):
        if n in bad:
            continue
        middle, last = second[n], third[n]
        assert isinstance(middle, Answer)
        assert isinstance(last, Answer)
        assert (middle.observation, middle.done) == (f"a{n} b{n}", False)
        assert (last.observation, last.reward, last.done) == (f"a{n} b{n} c", 2.0, True)
        assert last.info["success"] is True
        assert "object" not in last.info
    details = {bad[n]: second[n].detail for n in bad}  # type: ignore[union-attr]
    assert details["hang"] == "took longer than 1 s (time_limit_seconds) and was killed"
    assert details["crash"] == "its process ended with signal SIGSEGV"
    assert details["raise"] == "RuntimeError: asked to"
    assert details["long"] == (
        "step's observation has 10000000 characters; max_observation_characters is 20000"
    )
    limits = "rewards are between -1e+09 and 1e+09"
    assert details["nan"] == f"step's reward: returned nan; {limits}"
    assert details["huge"] == f"step's reward: returned 1e+308; {limits}"
    assert details["flood"].startswith("step's info has 10000004 characters; ")


@pytest.mark.parametrize("action", ["hang", "raise", "crash"])
def test_a_task_that_cannot_begin_is_lost_alone(action: str) -> None:
    begin = starts(5)
    begin[2][0]["at_reset"] = action
    with pool() as made:
        found = made.reset(begin)
        after = made.step(dict.fromkeys((0, 1, 3, 4), "a"))
    assert [n for n, outcome in found.items() if isinstance(outcome, Failure)] == [2]
    assert [outcome.observation for outcome in after.values()] == ["a"] * 4  # type: ignore[union-attr]


def test_an_episode_that_shows_something_else_when_acted_again_is_lost_and_says_so() -> None:
    with pool("Forgetful") as made:
        made.reset(starts(2))
        made.step({0: "a", 1: "b"})
        second = made.step({0: "crash", 1: "c"})
    assert [outcome.kind for outcome in second.values()] == ["crash", "not_repeatable"]  # type: ignore[union-attr]


def test_an_environment_that_always_hangs_is_given_up_soon() -> None:
    begin = starts(100)
    for task, _ in begin.values():
        task["at_reset"] = "hang"
    before = time.monotonic()
    with pool(time_limit_seconds=0.2) as made:
        found = made.reset(begin)
    assert time.monotonic() - before < 20
    kinds = [outcome.kind for outcome in found.values()]  # type: ignore[union-attr]
    assert kinds == ["timeout"] * 8 + ["not_asked"] * 92


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Unmakeable", "ValueError: not today"),
        ("Nothing", "PlugError: .*AttributeError: .*Nothing"),
    ],
)
def test_one_that_cannot_be_made_stops_the_run_with_the_reason(
    name: str, reason: str, workers: int
) -> None:
    message = f"environment {HERE}:{name}: could not start: {reason}"
    with pytest.raises(BrokenEnvironment, match=message), pool(name, workers=workers) as made:
        made.reset(starts(1))


def test_without_processes_errors_are_marked_as_well() -> None:
    with pool(workers=0) as made:
        made.reset(starts(3))
        found = made.step({0: "raise", 1: "nan", 2: "fine"})
    assert [type(outcome) for outcome in found.values()] == [Failure, Failure, Answer]


def test_finished_episodes_are_forgotten_and_their_environments_used_again() -> None:
    with pool(workers=0) as made:
        for _ in range(5):
            made.reset(starts(4))
            made.step(dict.fromkeys(range(4), "a"))
            made.end(range(4))
        made.reset(starts(1))
        server = made._servers[0]._here
        assert server is not None
        assert len(server.running) == 1
        assert len(server.idle) == 3
        assert len(made._histories) == 1


def test_an_environment_that_forks_answers_each_episode_with_its_own() -> None:
    with pool(workers=1) as made:
        made.reset(starts(3))
        for turn in range(2):
            found = made.step({n: "fork" if n == 1 else f"a{n}{turn}" for n in range(3)})
            assert all(isinstance(one, Answer) for one in found.values())
            assert [found[n].observation.split()[-1] for n in (0, 2)] == [  # type: ignore[union-attr]
                f"a0{turn}",
                f"a2{turn}",
            ]
