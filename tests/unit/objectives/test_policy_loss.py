"""Each loss against its textbook formula in fp64, differentiated by autograd."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from policy_cases import MAX_COMPLETION_TOKENS, Rectangle, ours, rectangle
from pydantic import ValidationError
from torch import Tensor

from megarlx.config.policy import PRESETS, PolicyConfig
from megarlx.objectives.policy_loss import gap_sums, policy_fields
from megarlx.rollouts.completions import Completions, overlong_penalty, select

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
LOSSES = {
    "reinforce": {"loss": "reinforce"},
    "ppo_clip": {"loss": "ppo_clip", **CLIP},
    "dual_clip": {"loss": "ppo_clip", "dual_clip": 1.4, **CLIP},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    "gspo": {"loss": "gspo", "clip_low": 0.1, "clip_high": 0.1},
    "sapo": {"loss": "sapo", "sapo_temperatures": (1.0, 1.5)},
}
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "sequence_sum_fixed")
EXTRAS = {
    "plain": {},
    "k1": {"kl": "k1", "kl_coefficient": 0.3},
    "k2": {"kl": "k2", "kl_coefficient": 0.3},
    "k3_entropy_cap": {
        "kl": "k3",
        "kl_coefficient": 0.1,
        "entropy_coefficient": 0.2,
        "importance_cap": 1.2,
    },
    "masks": {"sequence_mask": 0.05, "overlong": "mask"},
}


def textbook(config: PolicyConfig, case: Rectangle, logits: Tensor) -> Tensor:
    mask = case.written.clone()
    if config.overlong == "mask":
        mask[case.truncated] = False
    lp, a = case.logprobs(logits), case.advantages[:, None]
    per_sequence = mask.sum(1).clamp_min(1)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio = (lp - case.old).exp()
    if config.loss == "gspo":
        mean = ((lp - case.old) * mask).sum(1, keepdim=True) / per_sequence[:, None]
        # of a token, as ARLArena writes it: with the gradient of this token alone
        ratio = mean.exp().detach() * (lp - lp.detach()).exp()
    if config.loss == "reinforce":
        policy = a * lp
    elif config.loss in ("ppo_clip", "gspo"):
        policy = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
        if config.dual_clip:
            policy = torch.where(a < 0, policy.maximum(config.dual_clip * a), policy)
    elif config.loss == "cispo":
        policy = ratio.clamp(low, high).detach() * a * lp
    else:
        steepness = torch.where(a > 0, *torch.tensor(config.sapo_temperatures).double())
        policy = 4 / steepness * torch.sigmoid(steepness * (ratio - 1)) * a
    if config.importance_cap is not None:
        policy = policy * (case.old - case.rollout).exp().clamp_max(config.importance_cap)
    if config.sequence_mask is not None:
        fallen = ((case.rollout - lp) * mask).sum(1, keepdim=True) / per_sequence[:, None]
        policy = policy * ~((fallen > config.sequence_mask) & (a < 0))
    loss = -policy - config.entropy_coefficient * case.entropy(logits)
    gap = case.ref - lp
    if config.kl == "k1":
        loss = loss - config.kl_coefficient * gap
    elif config.kl == "k2":
        loss = loss + config.kl_coefficient * gap**2 / 2
    elif config.kl == "k3":
        loss = loss + config.kl_coefficient * (gap.exp() - 1 - gap)
    loss = loss * mask
    sequences = mask.any(1).sum()
    if config.aggregation == "token_mean":
        return loss.sum() / mask.sum()
    if config.aggregation == "sequence_mean":
        return (loss.sum(1) / per_sequence).sum() / sequences
    if config.aggregation == "sequence_sum":
        return loss.sum() / sequences
    return loss.sum() / (sequences * MAX_COMPLETION_TOKENS)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_the_textbooks(name: str, aggregation: str, extra: str) -> None:
    config = PolicyConfig(aggregation=aggregation, **LOSSES[name], **EXTRAS[extra])
    case = rectangle()
    logits = case.logits.detach().requires_grad_()
    expected = textbook(config, case, logits)
    (gradient,) = torch.autograd.grad(expected, logits)
    loss, ours_gradient = ours(config, case)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours_gradient, gradient, rtol=1e-10, atol=1e-13)
    assert ours_gradient.abs().sum() > 0


def test_the_examples_do_clip_mask_and_cap() -> None:
    """Otherwise the comparison above would compare less than it says."""
    case = rectangle()
    plain, _ = ours(PolicyConfig(loss="ppo_clip", clip_low=100.0, clip_high=100.0), case)
    for change in (*({**c} for c in LOSSES.values()), {"importance_cap": 1.2},
                   {"sequence_mask": 0.05}, {"overlong": "mask"}):  # fmt: skip
        wide = {"clip_low": 100.0, "clip_high": 100.0}
        assert not torch.allclose(ours(PolicyConfig(**{**wide, **change}), case)[0], plain)


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_all_losses_have_the_gradient_of_reinforce(name: str) -> None:
    case = rectangle()
    case = replace(case, old=case.logprobs(case.logits).where(case.written, 0))
    _, expected = ours(PolicyConfig(loss="reinforce"), case)
    _, gradient = ours(PolicyConfig(**LOSSES[name]), case)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


def test_advantages_of_tokens_are_used_as_those_of_sequences_are() -> None:
    case, config = rectangle(), PolicyConfig()
    made = case.completions
    by_sequence = policy_fields(config, made, case.advantages, max_completion_tokens=9)
    spread = case.advantages[made.sequence_of_token]
    by_token = policy_fields(config, made, spread, max_completion_tokens=9)
    assert torch.equal(by_sequence.advantages, by_token.advantages)


def test_normaliser_counts_tokens_or_sequences_that_are_learned_from() -> None:
    case = rectangle()
    tokens = case.written.sum(1).double()
    for aggregation in AGGREGATIONS:
        config = PolicyConfig(aggregation=aggregation, overlong="mask")
        found = policy_fields(
            config, case.completions, case.advantages, max_completion_tokens=9
        ).sequence_weights
        expected = tokens if aggregation == "token_mean" else torch.ones(6).double()
        assert found.tolist() == [*expected[:4].tolist(), 0.0, expected[5].item()]


def test_a_minibatch_keeps_each_sequences_own_fields() -> None:
    case = rectangle()
    chosen = torch.tensor([4, 0, 5])
    part = select(case.completions, chosen)
    expected = Rectangle(*(getattr(case, f.name)[chosen] for f in fields(Rectangle))).completions
    for field in fields(part):
        assert torch.equal(getattr(part, field.name), getattr(expected, field.name)), field.name
    assert len(select(case.completions, chosen[:0]).tokens) == 0


def test_completions_are_made_of_prompts_and_what_was_sampled() -> None:
    made = Completions.of(
        [[5, 6], [7]],
        [torch.tensor([1]), torch.tensor([2, 3])],
        rollout_logprobs=[torch.tensor([-0.5]), torch.tensor([-1.0, -2.0])],
        truncated=[False, True],
    )
    assert made.tokens.tolist() == [5, 6, 1, 7, 2, 3]
    assert made.lengths.tolist() == [3, 3]
    assert made.written.tolist() == [False, False, True, False, True, True]
    assert made.rollout_logprobs.tolist() == [0, 0, -0.5, 0, -1, -2]
    assert made.truncated.tolist() == [False, True]


def test_gap_is_zero_for_equal_logprobs_and_sums_what_differs() -> None:
    a = torch.tensor([0.0, -1.0, -2.0, -3.0])
    mask = torch.tensor([False, True, True, True])
    assert all(v == 0 for k, v in gap_sums(a, a, mask).items() if k != "tokens")
    b = torch.tensor([9.0, -1.5, -2.0, -2.0])
    found = gap_sums(a, b, mask)
    assert found["gap"] == 1.5
    assert found["gap_max"] == 1
    assert found["tokens"] == 3
    k3 = sum(torch.tensor(d).exp() - 1 - d for d in (-0.5, 0.0, 1.0))
    torch.testing.assert_close(found["kl"], k3.double())


def test_overlong_penalty_grows_in_the_buffer_only() -> None:
    tokens = torch.tensor([1.0, 80.0, 90.0, 100.0, 120.0])
    assert overlong_penalty(tokens, 100, 0.2).tolist() == [0, 0, -0.5, -1, -1]


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (PolicyConfig(kl="k1", kl_coefficient=0.1), "ref_logprobs"),
        (PolicyConfig(importance_cap=2.0), "rollout_logprobs"),
        (PolicyConfig(overlong="mask"), "truncated"),
    ],
)
def test_what_a_setting_needs_and_is_not_there_is_named(config: PolicyConfig, missing: str) -> None:
    made = replace(rectangle().completions, **{missing: None})
    with pytest.raises(ValueError, match=rf"^policy loss: {missing} is missing; .* needs it$"):
        policy_fields(config, made, torch.zeros(6).double(), max_completion_tokens=9)


def test_nan_advantages_and_wrong_lengths_are_refused() -> None:
    made = rectangle().completions
    for bad in (torch.full((6,), float("nan")), torch.zeros(5)):
        with pytest.raises(ValueError, match="policy loss: advantages of shape"):
            policy_fields(PolicyConfig(), made, bad, max_completion_tokens=9)
    with pytest.raises(ValueError, match="first token of a sequence"):
        replace(made, written=torch.ones_like(made.written))
    with pytest.raises(ValueError, match="add up to"):
        replace(made, lengths=made.lengths + 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_settings_and_yields_to_given_ones(preset: str) -> None:
    config = PolicyConfig(preset=preset)
    assert {key: getattr(config, key) for key in PRESETS[preset]} == PRESETS[preset]
    again = PolicyConfig.model_validate_json(config.to_json())
    assert again == config
    changed = PolicyConfig(preset=preset, clip_high=0.5)
    assert changed.model_dump() == {**config.model_dump(), "clip_high": 0.5}


@pytest.mark.parametrize(
    "wrong",
    [
        {"kl": "k1"},
        {"kl_coefficient": 0.1},
        {"dual_clip": 0.5},
        {"loss": "cispo", "dual_clip": 3.0},
        {"sapo_temperatures": (0.0, 1.0)},
        {"preset": "ppo"},
        {"overlong_buffer": 0.0},
        {"loss": "ppo"},
        {"aggregation": "mean"},
        {"advantage": "mine"},
        {"loss_options": {"clip_low": 3}},
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        PolicyConfig(**wrong)


def test_the_documented_table_is_what_the_presets_are() -> None:
    text = (Path(__file__).parents[3] / "docs" / "rl.md").read_text()
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    table = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    header = next(row for row in table if row[0] == "setting")
    assert header[1:] == list(PRESETS)
    rows = {row[0]: row[1:] for row in table if len(row) == len(header) and row != header}
    presets = [PolicyConfig(preset=name) for name in PRESETS]
    for setting, cells in rows.items():
        assert cells == [str(getattr(p, setting)).lower() for p in presets], setting
    assert set(rows) >= {key for settings in PRESETS.values() for key in settings}
