"""The token losses over vocabulary shards in real groups against one process, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.token_loss import token_loss

SPECS = [
    LossSpec(),
    LossSpec("ppo_clip", kl="k3", kl_coefficient=0.2, entropy_coefficient=0.05),
    LossSpec("cispo", kl="k2", kl_coefficient=0.1),
    LossSpec("nll", z_loss=0.3),
    LossSpec("reinforce", z_loss=0.3),
]
TOKENS, SIZE, VOCABULARY, WIDTH = 19, 6, 41, 48  # 48 padded ids: 16 or 12 or 24 a rank


def case(spec: LossSpec) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None]]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    inputs = {
        "mask": torch.rand(TOKENS, generator=generator) > 0.2,
        "advantages": None if spec.mode == "nll" else normal(TOKENS),
        "old_logprobs": -normal(TOKENS).abs() - 3,
        "ref_logprobs": -normal(TOKENS).abs() - 3,
    }
    return normal(TOKENS, SIZE), F.pad(normal(VOCABULARY, SIZE), (0, 0, 0, 7)), targets, inputs


def sharded(
    size: int, spec: LossSpec, reduce_hidden_grad: bool, into: bool, mib: int
) -> dict[str, Tensor]:
    group = Mesh.build(tp=size).tp
    hidden, weight, targets, inputs = case(spec)
    mine = weight.chunk(size)[group.rank].clone().requires_grad_()
    hidden.requires_grad_()
    buffer = torch.zeros_like(mine).detach() if into else None
    common = {"normalizer": 4.0, "vocab_size": VOCABULARY, "group": group, **inputs}
    result = linear_token_loss(
        hidden,
        mine,
        targets,
        spec,
        rows_per_chunk=5,
        reduce_hidden_grad=reduce_hidden_grad,
        weight_grad_=buffer,
        kept_gradients_mib=mib,
        **common,
    )
    result.loss.backward()
    logits = (hidden.detach() @ mine.detach().t()).requires_grad_()
    of_logits = token_loss(logits, targets, spec, **common)
    of_logits.loss.backward()
    return {
        "loss": result.loss.detach(),
        "logprobs": result.logprobs,
        "entropy": result.entropy,
        "metrics": result.metrics,
        "hidden": hidden.grad,
        "weight": mine.grad if buffer is None else buffer,
        "logits": logits.grad,
        "loss_of_logits": of_logits.loss.detach(),
    }


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.mode}-{spec.z_loss}")
@pytest.mark.parametrize(
    ("reduced", "into", "mib"), [(True, False, 0), (False, True, 0), (False, True, 1)]
)
def test_any_number_of_shards_gives_the_single_process_result(
    run, size: int, spec: LossSpec, reduced: bool, into: bool, mib: int
) -> None:
    hidden, weight, targets, inputs = case(spec)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden @ weight.t()).detach().requires_grad_()
    common = {"normalizer": 4.0, "vocab_size": VOCABULARY, **inputs}
    expected = token_loss(logits, targets, spec, **common)
    expected.loss.backward()
    linear_token_loss(hidden, weight, targets, spec, **common).loss.backward()
    ranks = run(size, sharded, size, spec, reduced, into, mib)
    close = {"rtol": 1e-10, "atol": 1e-12}
    for rank in ranks:
        for name in ("loss", "logprobs", "entropy", "metrics"):
            torch.testing.assert_close(rank[name], getattr(expected, name).detach(), **close)
            assert torch.equal(rank[name], ranks[0][name])
        torch.testing.assert_close(rank["loss_of_logits"], expected.loss.detach(), **close)
        if reduced:
            torch.testing.assert_close(rank["hidden"], hidden.grad, **close)
    if not reduced:
        total = torch.stack([rank["hidden"] for rank in ranks]).sum(0)
        torch.testing.assert_close(total, hidden.grad, **close)
    torch.testing.assert_close(torch.cat([r["weight"] for r in ranks]), weight.grad, **close)
    torch.testing.assert_close(torch.cat([r["logits"] for r in ranks], 1), logits.grad, **close)
