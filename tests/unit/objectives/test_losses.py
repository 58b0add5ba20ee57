"""Policy losses, advantages and aggregations by name; what is tried before a run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from policy_cases import MAX_COMPLETION_TOKENS, Rectangle, ours, rectangle
from torch import Tensor

from megarlx import plug
from megarlx.config.policy import PRESETS, PolicyConfig
from megarlx.objectives.losses import (
    LossError,
    gspo,
    loss_spec,
    policy_loss,
    ratio,
    sapo,
    sequence_mean,
    try_loss,
)
from megarlx.objectives.packing import Layout, deal, policy_batch
from megarlx.objectives.policy_loss import policy_fields
from megarlx.ops import LossSpec, linear_token_loss, token_loss
from megarlx.ops.policy_loss import PolicyLoss


def composed(config: PolicyConfig, case: Rectangle) -> Tensor:
    """The gradient as it was when every loss was made of the native op and constants: gspo is
    ppo_clip with old = lp - log s, sapo is reinforce with the advantage 4 σ(1 - σ) r A."""
    logits = case.logits.detach().requires_grad_()
    made = case.completions
    now = case.flat(case.logprobs(case.logits)).where(made.written, 0)
    fields = policy_fields(
        config, made, case.advantages, max_completion_tokens=MAX_COMPLETION_TOKENS
    )
    old, advantages, sequence = fields.old_logprobs, fields.advantages, made.sequence_of_token
    assert old is not None
    mode: Any = {"gspo": "ppo_clip", "sapo": "reinforce"}.get(config.loss, config.loss)
    if config.loss == "gspo":
        sums = torch.zeros(2, len(made.lengths), dtype=torch.float64)
        both = torch.stack(((now - old).where(fields.mask, 0), fields.mask.double()))
        total, count = sums.index_add(1, sequence, both)
        old = now - (total / count.clamp_min(1))[sequence]
    elif config.loss == "sapo":
        r, tau = (now - old).exp(), torch.tensor(config.sapo_temperatures, dtype=torch.float64)
        steepness = torch.where(advantages > 0, tau[0], tau[1])
        gate = torch.sigmoid(steepness * (r - 1))
        advantages, old = advantages * 4 * gate * (1 - gate) * r, None
    spec = LossSpec(
        mode, config.clip_low, config.clip_high, config.dual_clip, config.kl_of_loss,
        0.0 if config.kl_of_loss == "none" else config.kl_coefficient, config.entropy_coefficient,
    )  # fmt: skip
    loss = token_loss(
        logits[case.real], made.tokens, spec,
        normalizer=fields.sequence_weights.sum(), mask=fields.mask, advantages=advantages,
        old_logprobs=old, ref_logprobs=fields.ref_logprobs, token_weights=fields.token_weights,
    ).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logits)
    return torch.cat((loss.detach().reshape(1), gradient.flatten()))


@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("name", [*PRESETS, "sapo", "dual_clip"])
def test_presets_equal_the_op(name: str, differ: bool) -> None:
    """Over shards: tests/distributed/test_policy_loss_layouts.py."""
    given: dict[str, Any] = {"preset": name, "entropy_coefficient": 0.1}
    if name in ("sapo", "dual_clip"):
        given = {"sapo": {"loss": "sapo"}, "dual_clip": {"loss": "gspo", "dual_clip": 1.05}}[name]
    config, case = PolicyConfig(**given), rectangle()
    if differ:  # inside a sequence
        tokens = int(case.real.sum())
        case = replace(case, advantages=(torch.arange(tokens).double() * 1.7).cos())
    loss, gradient = ours(config, case)
    expected = composed(config, case)
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(gradient.flatten(), expected[1:], rtol=1e-12, atol=1e-14)
    if name != "sapo":  # whose value was another
        torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=1e-14)


def test_the_exponential_of_the_mean_has_another_gradient_where_advantages_differ() -> None:
    """So that the comparison above would see a gspo without its detached mean."""

    @policy_loss(needs="sequence")
    def plain(t: Any, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
        return -ratio(sequence_mean(t, logprob - t.old), 0.0) * t.advantages

    case = rectangle()
    made, gradients = case.completions, []
    for loss in (plain, gspo):
        logits = case.logits[case.real].detach().requires_grad_()
        found = token_loss(
            logits, made.tokens, LossSpec(loss, settings=PolicyConfig(clip_low=99, clip_high=99)),
            normalizer=1, mask=made.written, sequence=made.sequence_of_token, sequences=6,
            advantages=torch.arange(len(made.tokens)).double().cos(),
            old_logprobs=made.old_logprobs,
        ).loss  # fmt: skip
        gradients.append((found.detach(), torch.autograd.grad(found, logits)[0]))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-12, atol=1e-12)
    assert (gradients[0][1] - gradients[1][1]).norm() > 0.1 * gradients[1][1].norm()


def spec_of(function: Any, **settings: Any) -> LossSpec:
    return LossSpec(PolicyLoss.of(function), settings=SimpleNamespace(**settings))


def centred(t: Any, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
    return -(t.advantages - t.advantages.mean()) * logprob


def noisy(t: Any, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
    return -t.advantages * logprob * torch.rand_like(logprob)


def with_the_one_before(t: Any, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
    return -t.advantages * (logprob + logprob.roll(1))


@policy_loss(needs="sequence")
def over_all_sequences(t: Any, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
    return -t.advantages * (logprob - sequence_mean(t, logprob).mean())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t, lp, h, c: lp.mean(), r"an objective a token"),
        (lambda t, lp, h, c: -t.advantages * lp.detach(), "has no gradient"),
        (lambda t, lp, h, c: lp / 0, "not finite"),
        (lambda t, lp, h, c: lp * c.slope, "AttributeError: .*slope"),
        (noisy, "it may draw no random numbers"),
        (centred, "it may look at no other sequence, and with needs='sequence'"),
        (with_the_one_before, "gives a token other numbers when others are left out"),
        (over_all_sequences, "gives a sequence other numbers when others are left out"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_is_tried_first(function: Any, message: str, dtype: torch.dtype) -> None:
    with pytest.raises(LossError, match=f"(?s)^policy loss .*on made-up tokens: .*{message}"):
        try_loss(spec_of(function), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", plug.ours("loss"))
def test_our_losses_pass_their_trial(loss: str, dtype: torch.dtype) -> None:
    for more in ({}, {"sequence_mask": 0.05}, {"kl": "k3", "kl_coefficient": 0.1}):
        try_loss(loss_spec(PolicyConfig(loss=loss, **more)), dtype)


def test_losses_of_single_tokens_without_other_settings_are_the_native_ones() -> None:
    for loss in ("reinforce", "ppo_clip", "cispo"):
        assert loss_spec(PolicyConfig(loss=loss)).mode == loss
        assert not loss_spec(PolicyConfig(loss=loss, sequence_mask=0.1)).is_native
    assert loss_spec(PolicyConfig(loss="gspo")).mode is gspo
    assert loss_spec(PolicyConfig(loss="sapo")).mode is sapo
    assert loss_spec(PolicyConfig(preset="gspo")).metrics[1] == "clip_fraction"


def test_sequence_losses_need_whole_sequences() -> None:
    """Every sequence is in one micro-batch, under one number; without numbers nothing runs."""
    case = rectangle()
    made, config = case.completions, PolicyConfig(preset="gspo")
    lengths = made.lengths.tolist()
    fields = policy_fields(config, made, case.advantages, max_completion_tokens=11)
    seen = []
    for rank in range(2):
        layout = Layout.of(made.lengths, deal(lengths, tokens_per_microbatch=14, ranks=2), rank)
        batch = policy_batch(made, fields, layout, loss_spec(config))
        parts = [part.inputs for part in batch.microbatches]
        for inputs, source in zip(parts, layout.source, strict=True):
            numbers = inputs.sequence
            assert numbers is not None
            assert inputs.sequences == layout.most_sequences >= int(numbers.max()) + 1
            assert torch.equal(numbers < 0, source < 0)
            for number in numbers[numbers >= 0].unique().tolist():
                held = made.sequence_of_token[source[numbers == number]]
                assert len(held) == lengths[int(held[0])] - 1
                assert (held == held[0]).all()
                seen.append(int(held[0]))
        plain = policy_batch(made, fields, layout, loss_spec(PolicyConfig()))
        assert all(part.inputs.sequence is None for part in plain.microbatches)
    assert sorted(seen) == list(range(6))
    with pytest.raises(ValueError, match=r"sequence is missing; allowed: the number of each"):
        linear_token_loss(
            torch.randn(5, 3), torch.randn(7, 3), torch.zeros(5).long(), loss_spec(config),
            normalizer=1, advantages=torch.ones(5),
        )  # fmt: skip


def halved(counts: Tensor, sequence: Tensor, c: Any) -> Any:
    return c.share * torch.ones_like(sequence, dtype=torch.float64), counts


def wrong(counts: Tensor, sequence: Tensor, c: Any) -> Any:
    return counts, counts


def test_an_aggregation_of_ones_own_weighs_tokens() -> None:
    case = rectangle()
    name = f"{__name__}:halved"
    plain, gradient = ours(PolicyConfig(), case)
    options = {"share": 0.5}
    half, half_gradient = ours(PolicyConfig(aggregation=name, loss_options=options), case)
    torch.testing.assert_close(half, plain / 2)
    torch.testing.assert_close(half_gradient, gradient / 2)
    with pytest.raises(ValueError, match=r"aggregation .*:wrong: weights of shape \(6,\) and"):
        ours(PolicyConfig(aggregation=f"{__name__}:wrong"), case)


def steep(t: Any, logprob: Tensor, entropy: Tensor, c: Any) -> Tensor:
    return -ratio(logprob, t.old).clamp_max(c.most) * t.advantages


def test_a_loss_of_ones_own_is_named_in_the_configuration() -> None:
    case = rectangle()
    own = PolicyConfig(loss=f"{__name__}:steep", loss_options={"most": 1e9})
    wide = PolicyConfig(clip_low=1.0, clip_high=1e9)
    torch.testing.assert_close(ours(own, case), ours(wide, case), rtol=1e-12, atol=1e-13)
    with pytest.raises(LossError, match=r"policy loss steep, .*AttributeError.*most"):
        try_loss(loss_spec(PolicyConfig(loss=f"{__name__}:steep")), torch.float64)
    with pytest.raises(plug.PlugError, match=r"loss '.*:gone' cannot be imported"):
        loss_spec(PolicyConfig(loss=f"{__name__}:gone"))
