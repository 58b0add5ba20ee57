"""Packing changes no number: only where it is computed. Letters: T tokens, N sequences."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarlx.config.model import family_config
from megarlx.config.policy import PolicyConfig
from megarlx.model.transformer import Stage
from megarlx.objectives.losses import loss_spec
from megarlx.objectives.packing import Deal, Layout, deal, policy_batch
from megarlx.objectives.policy_loss import policy_fields
from megarlx.ops import LossSpec, linear_token_loss
from megarlx.parallel.microbatches import Loss, call_stage
from megarlx.rollouts.completions import Completions

MODEL = family_config(
    "olmo2", vocab_size=23, hidden_size=20, layers=2, heads=2, kv_heads=1, head_dim=8,
    intermediate_size=28, rope_theta=10_000.0, init_std=0.3,
)  # fmt: skip
LENGTHS = [9, 4, 15, 2, 7, 7, 11, 3, 5, 13]


def stage() -> Stage:
    return Stage(MODEL, dtype=torch.float64).initialise_(3)


def completions(seed: int = 0) -> tuple[Completions, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    total = int(lengths.sum())
    written = torch.rand(total, generator=generator) > 0.3
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]))
    written[starts] = False

    def logprobs() -> Tensor:
        return -torch.rand(total, generator=generator, dtype=torch.float64) * written

    made = Completions(
        torch.randint(0, 23, (total,), generator=generator),
        lengths, written, logprobs(), logprobs(), logprobs(),
    )  # fmt: skip
    return made, torch.randn(len(lengths), generator=generator, dtype=torch.float64)


def head_loss(spec: LossSpec, normalizer: Tensor, **more: Any) -> Loss:
    return lambda head, inputs: head.token_loss(inputs, spec, normalizer=normalizer, **more)


def gradients(model: Stage) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def one_by_one(config: PolicyConfig, made: Completions, advantages: Tensor) -> tuple:
    """Each sequence alone through the model, the loss written out over its log-probs."""
    model, spec = stage(), loss_spec(config)
    fields = policy_fields(config, made, advantages, max_completion_tokens=16)
    normalizer = fields.sequence_weights.sum()
    loss = 0.0
    for a, b in zip(made.offsets[:-1].tolist(), made.offsets[1:].tolist(), strict=True):
        hidden = model(made.tokens[None, a : b - 1])
        chosen = slice(a + 1, b)
        weights = None if fields.token_weights is None else fields.token_weights[chosen]
        part = linear_token_loss(
            hidden,
            model.head_weight,
            made.tokens[chosen],
            spec,
            normalizer=normalizer,
            vocab_size=23,
            mask=fields.mask[chosen],
            advantages=fields.advantages[chosen],
            old_logprobs=None if fields.old_logprobs is None else fields.old_logprobs[chosen],
            ref_logprobs=None if fields.ref_logprobs is None else fields.ref_logprobs[chosen],
            token_weights=weights,
        ).loss
        part.backward()
        loss += part.item()
    return loss, gradients(model)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(preset="grpo"),
        PolicyConfig(preset="dr_grpo", entropy_coefficient=0.1, importance_cap=1.5),
        PolicyConfig(preset="rloo", kl="k2"),
        PolicyConfig(preset="cispo"),
    ],
    ids=lambda c: c.preset,
)
def test_packed_ranks_together_equal_each_sequence_alone(config: PolicyConfig, ranks: int) -> None:
    made, advantages = completions()
    expected, expected_gradients = one_by_one(config, made, advantages)
    fields = policy_fields(config, made, advantages, max_completion_tokens=16)
    dealt = deal(LENGTHS, tokens_per_microbatch=24, ranks=ranks)
    spec = loss_spec(config)
    batches = [
        policy_batch(made, fields, Layout.of(made.lengths, dealt, rank), spec)
        for rank in range(ranks)
    ]
    normalizer = torch.stack([batch.weight for batch in batches]).sum()
    assert normalizer == fields.sequence_weights.sum()
    model, total = stage(), 0.0
    for batch in batches:
        assert len(batch.microbatches) == dealt.microbatches > 1 or ranks > 1
        for part in batch.microbatches:
            loss = call_stage(model, None, part, head_loss(spec, normalizer))
            loss.backward()
            total += loss.item()
    assert total == pytest.approx(expected, rel=1e-11)
    for name, gradient in gradients(model).items():
        other = expected_gradients[name]
        assert (gradient - other).norm() <= 1e-10 * other.norm(), name


def test_gspo_in_packed_sequences_equals_its_definition_on_whole_ones() -> None:
    """The model runs once: the loss sees the log-probs of whole sequences."""
    made, advantages = completions()
    config = PolicyConfig(preset="gspo", clip_low=0.3, clip_high=0.4)
    layout = Layout.of(made.lengths, deal(LENGTHS, tokens_per_microbatch=24))
    spec, model = loss_spec(config), stage()
    fields = policy_fields(config, made, advantages, max_completion_tokens=16)
    batch = policy_batch(made, fields, layout, spec)
    for part in batch.microbatches:
        call_stage(model, None, part, head_loss(spec, batch.weight, rows_per_chunk=7)).backward()

    other = stage()
    loss = torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate(
        zip(made.offsets[:-1].tolist(), made.offsets[1:].tolist(), strict=True)
    ):
        if not made.written[a:b].any():
            continue
        logp = other.logits(other(made.tokens[None, a : b - 1])).log_softmax(-1)
        lp = logp.gather(1, made.tokens[a + 1 : b, None])[:, 0][made.written[a + 1 : b]]
        ratio = (lp - made.old_logprobs[a:b][made.written[a:b]]).mean().exp()
        loss = loss - torch.minimum(ratio * advantages[i], ratio.clamp(0.7, 1.4) * advantages[i])
    learned = sum(bool(w.any()) for w in made.written.split(LENGTHS))
    (loss / learned).backward()
    expected = gradients(other)
    assert max(g.norm() for g in expected.values()) > 0
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(2, 33), min_size=1, max_size=60),
    ranks=st.integers(1, 5),
    multiple=st.integers(1, 4),
    width_multiple=st.sampled_from([1, 2, 4]),
)
def test_every_sequence_is_dealt_once_into_equal_shapes(
    lengths: list[int], ranks: int, multiple: int, width_multiple: int
) -> None:
    dealt = deal(
        lengths,
        tokens_per_microbatch=32,
        ranks=ranks,
        microbatches_multiple=multiple,
        width_multiple=width_multiple,
    )
    assert dealt.width <= 32
    assert dealt.width % width_multiple == 0
    assert {len(rank) for rank in dealt.ranks} == {dealt.microbatches}
    assert dealt.microbatches % multiple == 0
    held = [i for rank in dealt.ranks for microbatch in rank for i in microbatch]
    assert sorted(held) == list(range(len(lengths)))
    of_all = torch.tensor(lengths)
    values = torch.arange(1, int(of_all.sum()) + 1)
    back = torch.zeros_like(values)
    for rank in range(ranks):
        layout = Layout.of(of_all, dealt, rank)
        assert layout.source.shape == (dealt.microbatches, dealt.width)
        assert layout.tokens == layout.real.sum()
        for offsets, source in zip(layout.documents, layout.source, strict=True):
            pieces = offsets.diff()
            assert offsets[0] == 0
            assert offsets[-1] == dealt.width
            assert pieces.min() >= 0
            assert pieces.max() <= layout.longest
            for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                piece = source[a:b]  # a document is one sequence's tokens in order, or padding
                assert (piece.diff() == (0 if a < b and piece[0] < 0 else 1)).all()
        back += layout.take_back(layout.place(values))
    firsts = torch.zeros_like(values, dtype=torch.bool)
    firsts[of_all.cumsum(0) - of_all] = True
    assert torch.equal(back, values.masked_fill(firsts, 0))


def test_micro_batches_are_filled_evenly_and_small_batches_are_not_padded_to_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(50, 400, (256,), generator=generator).tolist()
    dealt = deal(lengths, tokens_per_microbatch=4096, ranks=4)
    loads = [sum(lengths[i] - 1 for i in m) for rank in dealt.ranks for m in rank]
    assert min(loads) > 0.95 * max(loads)
    assert len(loads) == 16  # 57,000 tokens
    assert deal([100, 120], tokens_per_microbatch=4096).width == 512


def test_the_same_lengths_are_always_dealt_the_same() -> None:
    assert deal(LENGTHS, tokens_per_microbatch=24, ranks=2) == deal(
        list(LENGTHS), tokens_per_microbatch=24, ranks=2
    )
    assert isinstance(deal(LENGTHS, tokens_per_microbatch=24), Deal)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3, 40], {}, r"sequence 1 has 40 tokens; tokens_per_microbatch = 24 allows 2 to 25"),
        ([1], {}, r"sequence 0 has 1 tokens"),
        ([], {}, "no sequences"),
        ([3], {"width_multiple": 16}, "must be a multiple of 16"),
    ],
)
def test_what_cannot_be_packed_is_named(lengths: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deal(lengths, tokens_per_microbatch=24, **options)
