"""The bank of a run's rollouts: what it holds, its bounds, and what is read back of it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rl_cases import config, model, reinforcement, trainer_of

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Group
from megarlx.config.distill import DistillConfig
from megarlx.config.objectives import RlConfig, SftConfig
from megarlx.config.rollouts import BankConfig, RolloutFilter, run_and_step
from megarlx.config.run_sections import SourceConfig
from megarlx.rollouts import bank as banks
from megarlx.rollouts.bank import Bank, BankError, Kept, conversations_of, filtered, read_bank
from megarlx.training.trainer import Trainer

WORLD = Group.alone("world")


def trainer(run: Path, seed: int = 3, **options: Any) -> Trainer:
    one = reinforcement(config(), model(seed))
    settings = BankConfig(**options)
    traffic = one.model.mesh.traffic
    one.sampler.bank = Bank(run / "rollouts" / "rl", settings, lambda: traffic.step)
    return trainer_of(one)


def contents(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "rollouts" / "rl").iterdir())}


def lines(run: Path) -> list[Any]:
    return [
        json.loads(x)
        for held in contents(run).values()
        for x in gzip.decompress(held).split(b"\n")[:-1]
    ]


def test_a_bank_holds_every_sample_with_its_rewards_step_and_weights(tmp_path: Path) -> None:
    made = trainer(tmp_path, tokens=True)
    made.step()
    rl = made.objectives["rl"]
    first = rl.current.completions  # type: ignore[attr-defined]
    ids = first.tokens[first.written].tolist()
    rewards = rl.current.rewards.flatten().tolist()  # type: ignore[attr-defined]
    made.step()
    kept = lines(tmp_path)
    assert list(contents(tmp_path)) == ["step_00000000.jsonl.gz", "step_00000001.jsonl.gz"]
    assert [(one["step"], one["weights"]) for one in kept] == [(0, 0)] * 16 + [(1, 1)] * 16
    assert [i for one in kept[:16] for i in one["tokens"]] == ids
    assert [one["reward"] for one in kept[:16]] == rewards
    assert all(list(one["rewards"].values()) == [one["reward"]] for one in kept)
    read = read_bank(str(tmp_path))
    assert [(one.prompt, one.text, one.reward) for one in read] == [
        (one["prompt"], one["text"], one["reward"]) for one in kept
    ]
    assert read_bank(str(tmp_path), 1) == read[:16]


def test_a_bank_is_the_same_bytes_after_a_kill(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    one = trainer(whole)
    for step in range(5):
        if step == 2:
            one.save(Saver(tmp_path / "checkpoints", WORLD), {}, blocking=True)
        one.step()
    expected = contents(whole)
    shutil.copytree(whole, killed)  # it was at its fifth step, and had begun to write one more
    (killed / "rollouts" / "rl" / ".step_00000005.jsonl.gz").write_bytes(b"half")
    (killed / "rollouts" / "rl" / "step_00000004.jsonl.gz").write_bytes(b"of another course")
    again = trainer(killed, seed=8)
    again.resume(tmp_path / "checkpoints" / "iter_00000002")
    again.step()
    assert list(contents(killed)) == list(expected)[:3]
    again.step(), again.step()
    assert contents(killed) == expected


def test_the_oldest_rollouts_go_when_a_bank_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(9))
    one = Bank(tmp_path, BankConfig(max_mib=1), lambda: next(steps))
    monkeypatch.setattr(banks, "MIB", 150)
    for step in range(8):
        one.add(step, [{"prompt": "p", "text": str(step)}])
        sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
        assert sum(sizes.values()) <= 150
    assert sorted(sizes) == ["step_00000006.jsonl.gz", "step_00000007.jsonl.gz"]
    one.add(8, [{"prompt": "p", "text": "".join(map(str, range(999)))}])
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000008.jsonl.gz"]


samples = st.lists(
    st.builds(
        Kept,
        st.sampled_from("abc"),
        st.sampled_from(["1", "#### 2", "#### 2\nmore", "#### 3", "\ufffd"]),
        st.sampled_from([0.0, 0.5, 1.0, None]),
        st.sampled_from(["stop", "length"]),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    samples,
    st.sampled_from([0.0, 1.0]),
    st.booleans(),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_filters_keep_what_they_say_and_count_what_they_take(
    given_: list[Kept], least: float, marked: bool, most: int, dedup: bool, newest: bool
) -> None:
    wanted = RolloutFilter(
        min_reward=least, marked=marked, per_question=most, dedup=dedup, newest=newest
    )
    left, out = filtered(given_, wanted)
    assert len(left) + sum(out.values()) == len(given_)
    allowed = [
        one
        for one in (given_[::-1] if newest else given_)
        if one.text != "\ufffd"
        and one.reward is not None
        and one.reward >= least
        and (one.marked or not marked)
    ]
    taken = sum(out.get(key, 0) for key in ("no_text", "min_reward", "marked"))
    assert len(given_) - len(allowed) == taken
    for question in "abc":
        mine = [one for one in allowed if one.prompt == question]
        texts = [one.text for one in mine]
        if dedup:
            mine = [one for at, one in enumerate(mine) if one.text not in texts[:at]]
        expected = mine[:most]
        found = [one for one in left if one.prompt == question]
        assert found == (expected[::-1] if newest else expected)


def test_rollouts_that_are_not_there_or_not_left_are_refused_with_counts(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"keeps no rollouts: .* \[rl.bank\] keeps them"):
        conversations_of(str(tmp_path), None, RolloutFilter())
    one = Bank(tmp_path / "rollouts" / "rl", BankConfig(), lambda: 3)
    line = {"prompt": "p", "text": " 7", "reward": 0.5, "finish_reason": "stop"}
    one.add(0, [line, line | {"reward": 1.0}, line | {"reward": None}])
    wanted = RolloutFilter(marked=True)
    with pytest.raises(
        BankError, match=r"of 3 rollouts nothing .* min_reward took 2, marked took 1"
    ):
        conversations_of(str(tmp_path), None, wanted)
    with pytest.raises(BankError, match="of its first 3 steps nothing is left: none was there"):
        conversations_of(str(tmp_path), 3, RolloutFilter())
    (found,) = conversations_of(str(tmp_path), 4, RolloutFilter())
    assert [turn.content for turn in found.turns] == ["p", "7"]
    (tmp_path / "rollouts" / "rl" / "step_00000003.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(BankError, match=r"step_00000003\.jsonl\.gz is damaged"):
        read_bank(str(tmp_path))


def test_what_is_too_long_stops_a_run_unless_a_model_wrote_it() -> None:
    teachers = ("runs/t@3",)
    forward = {"teachers": teachers, "kl": "forward", "rollouts": "runs/a"}
    whens = {
        "stop": [SftConfig(), RlConfig(), DistillConfig(teachers=teachers)],
        "skip": [SftConfig(conversations="rollouts:runs/a"), DistillConfig.model_validate(forward)],
    }
    for when, sections in whens.items():
        assert [section.when_too_long for section in sections] == [when] * len(sections)
    for told in ("stop", "skip"):
        values = {"conversations": "rollouts:runs/a", "too_long": told}
        assert SftConfig.model_validate(values).when_too_long == told


def test_names_of_rollouts_and_their_filters_are_checked() -> None:
    assert run_and_step("runs/a@b@40") == ("runs/a@b", 40)
    assert SftConfig(conversations="rollouts:runs/a").rollouts == ("runs/a", None)
    assert SourceConfig(name="own", rollouts="runs/a@7").prefix is None
    wrong: dict[str, tuple[Any, dict[str, Any]]] = {
        "conversations: is 'rollouts:a@latest'; allowed is rollouts:RUN": (
            SftConfig,
            {"conversations": "rollouts:a@latest"},
        ),
        "filter: is for conversations = 'rollouts:RUN'": (SftConfig, {"filter": {"marked": True}}),
        "prefix: is missing; a token file or rollouts": (SourceConfig, {"name": "a"}),
        "prefix: and rollouts cannot both": (
            SourceConfig,
            {"name": "a", "prefix": "p", "rollouts": "r"},
        ),
        "rollouts: is 'a@latest'; allowed is RUN": (
            SourceConfig,
            {"name": "a", "rollouts": "a@latest"},
        ),
        "filter: is for rollouts = 'RUN'": (
            SourceConfig,
            {"name": "a", "prefix": "p", "filter": {"newest": True}},
        ),
    }
    for text, (section, values) in wrong.items():
        with pytest.raises(ValidationError) as error:
            section.model_validate(values)
        assert text in str(error.value)
