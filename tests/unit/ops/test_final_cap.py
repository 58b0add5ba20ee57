"""Capped logits in the chunks of the linear token loss equal the loss of logits capped whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megarlx.ops import LossSpec, linear_token_loss, token_loss

CAP, VOCABULARY = 1.7, 23
SPECS = {
    "nll": LossSpec("nll"),
    "nll, z-loss": LossSpec("nll", z_loss=0.01),
    "ppo_clip": LossSpec("ppo_clip", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.02),
}


def fields(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "targets": torch.randint(VOCABULARY, (tokens,), generator=generator),
        "mask": torch.rand(tokens, generator=generator) < 0.7,
        "advantages": torch.randn(tokens, generator=generator, dtype=torch.float64),
        "old_logprobs": torch.full((tokens,), -3.0, dtype=torch.float64),
        "ref_logprobs": torch.full((tokens,), -3.2, dtype=torch.float64),
    }


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(41, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY + 5, 6, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("drop_masked", [False, True])
@pytest.mark.parametrize("rows", [7, 100])
@pytest.mark.parametrize("name", SPECS)
def test_a_cap_in_the_chunk_is_a_cap_of_all_logits(
    name: str, rows: int, drop_masked: bool, accumulates: bool
) -> None:
    spec, given = SPECS[name], fields(41)
    if name.startswith("nll"):
        given = {key: given[key] for key in ("targets", "mask")}
    hidden, weight = inputs()
    buffer = torch.zeros_like(weight) if accumulates else None
    found = linear_token_loss(
        hidden,
        weight,
        given["targets"],
        spec,
        **{k: v for k, v in given.items() if k != "targets"},
        normalizer=20.0,
        vocab_size=VOCABULARY,
        rows_per_chunk=rows,
        drop_masked=drop_masked,
        weight_grad_=None if buffer is None else buffer.detach(),
        final_cap=CAP,
    )
    found.loss.backward()
    same, other = (x.detach().requires_grad_() for x in (hidden, weight))
    logits = CAP * torch.tanh(same @ other.T / CAP)
    expected = token_loss(
        logits,
        given["targets"],
        spec,
        **{k: v for k, v in given.items() if k != "targets"},
        normalizer=20.0,
        vocab_size=VOCABULARY,
    )
    expected.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hidden.grad, same.grad, rtol=1e-11, atol=1e-14)
    of_weight = weight.grad if buffer is None else buffer
    torch.testing.assert_close(of_weight, other.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_that_is_none_is_refused(cap: float) -> None:
    hidden, weight = inputs()
    with pytest.raises(ValueError, match="final_cap"):
        linear_token_loss(
            hidden, weight, fields(41)["targets"], SPECS["nll"], normalizer=1.0, final_cap=cap
        )
