"""Advantages against the same formulas written sample by sample. Letters: P prompts, n samples."""

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarlx.config.policy import PolicyConfig
from megarlx.rollouts.advantages import (
    STD_FLOOR,
    Turns,
    compares_turns,
    discounted_returns,
    dr_grpo,
    gigpo,
    grpo,
    maxrl,
    rloo,
    sample_advantages,
    step_advantages,
    turn_advantages,
    uninformative,
)

NAN = math.nan
C = PolicyConfig().settings()
ADVANTAGES = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def by_hand(kind: str, group: list[float]) -> list[float]:
    known = [r for r in group if not math.isnan(r)]
    if len(known) < 2 or max(known) == min(known):
        return [0.0] * len(group)
    mean = statistics.fmean(known)
    out = []
    for r in group:
        if math.isnan(r):
            out.append(0.0)
        elif kind == "grpo":
            out.append((r - mean) / (statistics.stdev(known) + 1e-4))
        elif kind == "dr_grpo":
            out.append(r - mean)
        else:
            out.append(r - (sum(known) - r) / (len(known) - 1))
    return out


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=2, max_size=6))
def test_maxrl_divides_by_the_mean_and_a_mean_of_0_gives_0(group: list[float]) -> None:
    known = [r for r in group if not math.isnan(r)]
    expected = [0.0] * len(group)
    if len(known) > 1 and max(known) > min(known):
        mean = statistics.fmean(known)
        expected = [0.0 if math.isnan(r) else (r - mean) / mean for r in group]
    found = sample_advantages(
        PolicyConfig(advantage="maxrl"), torch.tensor([group], dtype=torch.float64)
    )
    assert found[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_maxrl_refuses_rewards_below_0_where_they_come_from() -> None:
    with pytest.raises(ValueError, match=r"a reward is -0.5; it allows none below 0"):
        maxrl(torch.tensor([[1.0, -0.5, NAN]]), C)
    for key, value in {"kl": "reward", "overlong": "penalty"}.items():
        given: dict[str, Any] = {"advantage": "maxrl", key: value}
        if key == "kl":
            given["kl_coefficient"] = 0.1
        with pytest.raises(
            ValueError, match=rf"{key}: is '{value}', which may take a reward below 0"
        ):
            PolicyConfig(**given)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1, -0.5, NAN]), min_size=n, max_size=n),
            min_size=1,
            max_size=5,
        )
    )
)
def test_each_advantage_is_its_formula_in_any_group(rewards: list[list[float]]) -> None:
    for kind, advantage in ADVANTAGES.items():
        ours = advantage(torch.tensor(rewards, dtype=torch.float64), C)
        theirs = torch.tensor([by_hand(kind, group) for group in rewards], dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_uninformative_groups_are_found_and_get_exactly_zero() -> None:
    a, b = 0.1 + 0.2, 0.3  # equal but for rounding
    rewards = torch.tensor(
        [[a, b, a], [0.0, 1.0, 0.0], [1.0, NAN, NAN], [NAN] * 3, [1.0, NAN, 1.0], [0.0, NAN, 1.0]],
        dtype=torch.float64,
    )
    assert uninformative(rewards).tolist() == [True, False, True, True, True, False]
    for advantage in ADVANTAGES.values():
        values = advantage(rewards, C)
        assert (values[uninformative(rewards)] == 0).all()
        assert (values[~uninformative(rewards)] != 0).any(1).all()


def test_advantages_sum_to_zero_and_do_not_depend_on_other_groups() -> None:
    rewards = torch.rand(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for advantage in ADVANTAGES.values():
        together = advantage(rewards, C)
        torch.testing.assert_close(together.sum(1), torch.zeros(7).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(together[3:4], advantage(rewards[3:4], C), rtol=0, atol=0)


def test_grpo_is_indifferent_to_the_scale_of_rewards_up_to_its_floor() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(grpo(10 * rewards, C), grpo(rewards, C), rtol=2 * STD_FLOOR, atol=0)
    torch.testing.assert_close(dr_grpo(10 * rewards, C), 10 * dr_grpo(rewards, C))
    torch.testing.assert_close(rloo(rewards, C), dr_grpo(rewards, C) * 4 / 3)


@pytest.mark.parametrize(
    "rewards", [torch.zeros(3), torch.zeros(2, 3).long(), torch.tensor([[0.0, math.inf]])]
)
def test_what_is_no_group_of_rewards_is_refused(rewards: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^advantages: "):
        grpo(rewards, C)


def test_trl_computes_the_same_advantages() -> None:
    """The group statistics of TRL's GRPOTrainer are its nanmean and nanstd."""
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).double()
    rewards[2, 1] = NAN
    mean = torch.nanmean(rewards, dim=1, keepdim=True)
    theirs = torch.nan_to_num((rewards - mean) / (utils.nanstd(rewards, dim=1)[:, None] + 1e-4))
    torch.testing.assert_close(grpo(rewards, C), theirs)
    torch.testing.assert_close(dr_grpo(rewards, C), torch.nan_to_num(rewards - mean))


# Two tasks; the observation 7 was seen twice in task 0's group and once in task 1's.
EPISODES = torch.tensor([0, 1, 0, 2, 1, 2, 2])
GROUPS = torch.tensor([0, 0, 0, 1, 0, 1, 1])
OBSERVATIONS = torch.tensor([7, 7, 8, 7, 9, 5, 5])
REWARDS = torch.tensor([0.0, 0.5, 1.0, 0.25, -1.0, 0.0, 2.0], dtype=torch.float64)


def test_returns_discount_the_rewards_behind_a_turn_in_its_episode() -> None:
    ours = discounted_returns(REWARDS, EPISODES, 0.9)
    expected = [0.9, 0.5 - 0.9, 1.0, 0.25 + 0.81 * 2.0, -1.0, 1.8, 2.0]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_turns_are_compared_where_a_group_saw_the_same() -> None:
    returns = torch.tensor([1.0, 3.0, 5.0, 9.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    ours = step_advantages(returns, GROUPS, OBSERVATIONS)
    unit = 1 / (math.sqrt(2) + STD_FLOOR)
    expected = torch.tensor([-unit, unit, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(ours, expected)
    assert len(step_advantages(returns[:0], GROUPS[:0], OBSERVATIONS[:0])) == 0


def test_gigpo_adds_turns_to_episodes_and_is_grpo_without_them() -> None:
    rewards = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
    turns = Turns(rewards, EPISODES, GROUPS, OBSERVATIONS, REWARDS)
    episode = grpo(rewards, C).flatten()
    assert torch.equal(gigpo(turns, PolicyConfig(omega=0.0).settings()), episode[EPISODES])
    steps = step_advantages(discounted_returns(REWARDS, EPISODES, 0.95), GROUPS, OBSERVATIONS)
    half = PolicyConfig(advantage="gigpo", omega=0.5)
    both = turn_advantages(half, turns)
    torch.testing.assert_close(both, episode[EPISODES] + 0.5 * steps)
    order = torch.tensor([1, 0, 3, 2, 4, 5, 6])  # episodes interleaved otherwise
    mixed = Turns(rewards, *(x[order] for x in (EPISODES, GROUPS, OBSERVATIONS, REWARDS)))
    torch.testing.assert_close(turn_advantages(half, mixed), both[order])


def over_half(rewards: Tensor, c: Any) -> Tensor:
    return rewards - c.threshold


def of_groups(rewards: Tensor, c: Any) -> Tensor:
    return rewards.nanmean(1)


def test_an_advantage_of_ones_own_is_named_in_the_configuration() -> None:
    rewards = torch.tensor([[0.0, 1.0, NAN], [0.75, 0.75, 0.75]], dtype=torch.float64)
    own = PolicyConfig(advantage=f"{__name__}:over_half", loss_options={"threshold": 0.5})
    found = sample_advantages(own, rewards)
    assert found.tolist() == [[-0.5, 0.5, 0.0], [0.25, 0.25, 0.25]]
    with pytest.raises(ValueError, match=r"advantage .*: the result is \[2\]; .*\[2, 3\]"):
        sample_advantages(PolicyConfig(advantage=f"{__name__}:of_groups"), rewards)
    assert compares_turns(PolicyConfig(preset="gigpo"))
    assert not compares_turns(own)
