"""Rewards that work, and rewards that hang, crash, raise or answer nonsense."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from misbehaving_rewards import ODD
from pydantic import ValidationError

from megarlx.comm.groups import Group
from megarlx.config.load import ConfigError, load_config
from megarlx.config.reward import RewardConfig
from megarlx.rollouts.rewards import values as reward_values
from megarlx.rollouts.rewards.process import RewardError
from megarlx.rollouts.rewards.rewards import Rewards, Scored
from megarlx.rollouts.rewards.sample import Sample

HERE = "misbehaving_rewards"


def samples(*completions: str) -> list[Sample]:
    return [Sample("how long?", text, "#### 5", {"source": "test"}) for text in completions]


@contextmanager
def rewards(*configs: dict[str, Any], allowed_failures: float = 1.0) -> Iterator[Rewards]:
    made = Rewards([RewardConfig(**config) for config in configs], allowed_failures)
    try:
        yield made
    finally:
        made.close()


def config(function: str = "obedient", **rest: Any) -> dict[str, Any]:
    limits = {"time_limit_seconds": 1.0, "samples_per_call": 4, "memory_limit_mb": 4096}
    return {"function": f"{HERE}:{function}", **limits, **rest}


def test_weighted_parts_add_up_and_none_has_nothing_to_say() -> None:
    both = (config(options={"factor": 2.0}), config(name="half", weight=0.5))
    with rewards(*both) as made:
        scored = made.score(samples("a", "none", "four"))
    assert scored.parts["obedient"] == pytest.approx([2, math.nan, 8], nan_ok=True)
    assert scored.parts["half"] == pytest.approx([1, math.nan, 4], nan_ok=True)
    assert scored.totals == pytest.approx([2.5, math.nan, 10], nan_ok=True)
    assert scored.failures == []
    found = scored.metrics()
    assert found["rl/reward"] == (12.5, 2)
    assert found["rl/reward_half"] == (5, 2)
    assert found["rl/reward_failures_half"] == (0, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_sample_is_lost_alone_marked_and_counted(workers: int) -> None:
    bad = {
        "hang": "timeout", "spin": "timeout", "crash": "crash", "exit": "crash", "raise": "error",
        "scalar": "wrong_shape", "text": "wrong_shape",
        "nan": "not_finite", "inf": "not_finite", "hoard": "error",
    }  # fmt: skip
    texts = [text for name in bad for text in ("abc", name, "de")]
    with rewards(config(workers=workers)) as made:
        scored = made.score(samples(*texts))
        again = made.score(samples("abc"))
    for at, text in enumerate(texts):
        expected = math.nan if text in bad else float(len(text))
        assert scored.totals[at] == pytest.approx(expected, nan_ok=True), text
    assert [(f.sample.completion, f.kind) for f in scored.failures] == list(bad.items())
    details = {f.sample.completion: f.detail for f in scored.failures}
    assert details["hang"] == "took longer than 1 s (time_limit_seconds) and was killed"
    assert details["crash"] == "its process ended with signal SIGSEGV"
    assert details["exit"] == "its process ended with exit status 3"
    assert details["raise"] == "RuntimeError: asked to"
    assert details["hoard"].startswith("MemoryError")
    assert scored.metrics()["rl/reward_failures_obedient"] == (len(bad), 1)
    assert again.totals == [3]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("text", "returned"), [("short", 2), ("long", 4)])
def test_a_reward_that_returns_more_or_fewer_values_than_samples_stops_the_run(
    workers: int, text: str, returned: int
) -> None:
    said = f"^reward obedient: returned {returned} values for 3 samples; it must return one"
    with (
        rewards(config(workers=workers), allowed_failures=1.0) as made,
        pytest.raises(RewardError, match=said),
    ):
        made.score(samples("a", text, "b"))


def test_a_failed_part_makes_the_total_unknown() -> None:
    with rewards(config(), config("process_id")) as made:
        scored = made.score(samples("raise", "ok"))
    assert math.isnan(scored.totals[0])
    assert not math.isnan(scored.parts["process_id"][0])
    assert not math.isnan(scored.totals[1])


def test_too_many_failures_stop_and_name_function_and_input() -> None:
    with rewards(config(), allowed_failures=0.25) as made:
        assert math.isnan(made.score(samples("raise", "a", "b", "c")).totals[0])
        message = (
            r"^reward misbehaving_rewards:obedient: failed on 2 of 4 samples; allowed are 25%\. "
            r"The first \(error: RuntimeError: asked to\) had prompt 'how long\?', "
            r"completion 'raise', reference '#### 5'$"
        )
        with pytest.raises(RewardError, match=message):
            made.score(samples("raise", "a", "nan", "c"), Group.alone("dp"))


def test_a_reward_that_cannot_start_stops_the_run_with_the_reason() -> None:
    cases = [
        ("no_such_module_here:f", {}, "ModuleNotFoundError: No module named 'no_such_module_here'"),
        (f"{HERE}:nothing", {}, "AttributeError: .*nothing"),
        (f"{HERE}:Counting", {"begin": 1}, "TypeError: .*begin"),
    ]
    for function, options, reason in cases:
        for workers in (0, 1):
            with (
                pytest.raises(RewardError, match=f"{function}: could not start: .*{reason}"),
                rewards({"function": function, "options": options, "workers": workers}) as made,
            ):
                made.score(samples("a"))


def test_a_class_is_made_once_and_keeps_its_state_until_its_process_dies() -> None:
    with rewards(config("Counting", options={"start": 10.0}, samples_per_call=2)) as made:
        assert made.score(samples("a", "b", "c")).totals == [12, 12, 13]
        assert made.score(samples("a")).totals == [14]


def test_without_workers_it_runs_here_and_errors_are_marked_as_well() -> None:
    with rewards(config("process_id", workers=0)) as made:
        assert made.score(samples("a")).totals == [os.getpid()]
    with rewards(config("process_id", workers=2, samples_per_call=1)) as made:
        assert os.getpid() not in made.score(samples(*"abcdefgh")).totals
    with rewards(config(workers=0)) as made:
        scored = made.score(samples("raise", "ok", "nan", "scalar", "text"))
    assert scored.totals == pytest.approx([math.nan, 2, *[math.nan] * 3], nan_ok=True)
    kinds = ["error", "not_finite", "wrong_shape", "wrong_shape"]
    assert [f.kind for f in scored.failures] == kinds


def test_no_process_is_left_and_none_is_forked_from_live_threads() -> None:
    before = threading.active_count()
    with rewards(config("process_id", workers=2, samples_per_call=1)) as made:
        found = {int(x) for x in made.score(samples(*"abcdefgh")).totals}
    for process in found:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert threading.active_count() == before


def test_completions_of_any_text_arrive_unchanged() -> None:
    texts = ["", "\n", "\ud800 half", "\x00", "é✓", "a" * 300_000, '"}]\n{"']
    with rewards(config(time_limit_seconds=20.0)) as made:
        assert made.score(samples(*texts)).totals == [len(text) for text in texts]


def test_a_hanging_sample_costs_about_its_time_limit() -> None:
    with rewards(config(time_limit_seconds=0.5)) as made:
        made.score(samples("start"))
        begin = time.monotonic()
        made.score(samples("hang"))
        assert 0.5 <= time.monotonic() - begin < 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_always_fails_is_given_up_soon(workers: int) -> None:
    text = "raise" if workers == 0 else "hang"
    with rewards(config(workers=workers, time_limit_seconds=0.2)) as made:
        scored = made.score(samples(*[text] * 200))
        again = made.score(samples("abc"))
    kinds = [f.kind for f in scored.failures]
    assert len(kinds) == 200
    assert kinds.index("not_asked") == 8
    assert set(kinds[8:]) == {"not_asked"}
    assert scored.failures[-1].detail == "8 of the 8 samples before it failed"
    assert again.totals == [3]


def test_rewards_of_ours_in_the_trainer_and_in_a_worker_score_alike() -> None:
    with rewards({"function": "final_number", "workers": 0}, {"function": "answer_format"}) as made:
        scored = made.score(samples("#### 5", "5", "#### 6"))
    assert scored.parts == {"final_number": [1, 1, 0], "answer_format": [1, 0, 1]}


@pytest.mark.parametrize("function", ["f", "module:", ":f", "module:f()", ""])
def test_what_names_no_function_is_refused(function: str) -> None:
    with pytest.raises(ValidationError, match="module:function or module:Class"):
        RewardConfig(function=function)


def test_a_wrong_reward_table_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "reward.toml"
    path.write_text('function = "judge"\noptions = 3\nworker = 2\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, (), RewardConfig)
    assert any("options is 3; expected a table" in p for p in caught.value.problems)
    assert any("did you mean 'workers'" in p for p in caught.value.problems)
    path.write_text('function = "judge"\noptions = { url = "http://x", retries = 3 }\n')
    assert load_config(path, (), RewardConfig).options == {"url": "http://x", "retries": 3}


def test_rewards_need_different_names() -> None:
    for configs in ([], [RewardConfig(function="a:f"), RewardConfig(function="b:f")]):
        with pytest.raises(RewardError, match="rewards need different names, and at least one"):
            Rewards(configs)


def test_math_equal_hangs_and_hoards_in_its_process_only() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    tower = "#### 9^{9^{9^{9}}}"
    limits = {"time_limit_seconds": 5.0, "memory_limit_mb": 2048, "start_limit_seconds": 60.0}
    with rewards({"function": "math_equal", **limits}) as made:
        scored: Scored = made.score(
            [Sample("", tower, r"\boxed{x}"), Sample("", r"\boxed{0.5}", r"\boxed{\frac12}")]
        )
    assert scored.totals[1] == 1
    assert scored.totals[0] == 0 or scored.failures[0].kind in ("timeout", "error", "crash")


@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
def test_a_reward_that_forks_gives_each_sample_its_own_value(how: str) -> None:
    with rewards(config("forks", options={"how": how})) as made:
        for texts in (["a", "bb"], ["ccc"], ["dddd", "e", "ff"], ["ggggg"]):
            assert made.score(samples(*texts)).totals == [len(text) for text in texts]


def test_a_reward_that_forks_while_it_is_made_answers_once() -> None:
    with rewards(config("ForksWhileMade")) as made:
        for text in ("a", "bb", "ccc"):
            assert made.score(samples(text)).totals == [len(text)]


@pytest.mark.parametrize(
    "text",
    [
        "nonsense\n",
        "no end",
        '{"rewards": [9], "number": 1}\n',
        "[]\n",
        "[" * 5000 + "\n",
        "\xff\n",
    ],
)
def test_what_is_no_answer_is_named_and_never_taken_for_one(text: str) -> None:
    with rewards(config("writes_to_pipe", options={"text": text}, samples_per_call=1)) as made:
        scored = made.score(samples("a", "write", "bb"))
    assert scored.totals == pytest.approx([1, math.nan, 2], nan_ok=True)
    (failure,) = scored.failures
    assert failure.kind == "crash"
    assert failure.detail.startswith("wrote ")
    assert failure.detail.endswith("where its answer 3 should be")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_number_or_too_large_a_one_is_no_reward(workers: int) -> None:
    large = {"huge": "too_large", "least": "too_large", "beyond": "not_finite"}
    kinds = {**dict.fromkeys(ODD, "wrong_shape"), **large}
    with rewards(config(workers=workers, samples_per_call=1)) as made:
        for text, kind in kinds.items():
            scored = made.score(samples("ab", text))
            assert scored.totals == pytest.approx([2, math.nan], nan_ok=True), text
            assert [f.kind for f in scored.failures] == [kind], text


@pytest.mark.parametrize("value", [True, 3, 2.5, np.float32(2.5), np.int64(3), torch.tensor(1.5)])
def test_numbers_of_any_library_are_rewards(value: Any) -> None:
    assert reward_values.number(value) == float(value)


@pytest.mark.parametrize("weight", [1e9, -1e9])
def test_the_largest_reward_under_the_largest_weight_has_a_sum(weight: float) -> None:
    parts = [config("largest", name=name, weight=weight, workers=0) for name in "abc"]
    with rewards(*parts) as made:
        total = made.score(samples("a")).totals[0]
    assert total == 3 * weight * reward_values.LARGEST
    assert math.isfinite(float(torch.tensor([total, -total]).std()))
    with pytest.raises(ValidationError):
        RewardConfig(**config(weight=2 * weight))


def test_rewards_that_all_say_nothing_are_told_of() -> None:
    with (
        rewards(config()) as made,
        pytest.warns(UserWarning, match="obedient: None for each of 2 samples: there is nothing"),
    ):
        made.score(samples("none", "none"))
