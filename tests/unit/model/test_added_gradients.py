"""Weight gradients that layers and head add past autograd: as autograd's, and all are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small
from torch import Tensor, nn

from megarlx.comm.groups import Mesh
from megarlx.model.build import build_model
from megarlx.ops import Head, LossInputs, LossSpec, TokenLoss, weight_gradient
from megarlx.parallel.microbatches import Microbatch

PARTS = 3


def microbatches(vocab_size: int) -> list[Microbatch]:
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(vocab_size, (2, 10), generator=draw) for _ in range(PARTS)]
    return [Microbatch(t[:, :-1], LossInputs(t[:, 1:].contiguous())) for t in tokens]


def trained(
    family: str, dtype: torch.dtype, as_it_is: bool = True, **options: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients by name, and the names in the order in which they were said to be complete."""
    config = small(family)
    model = build_model(config, Mesh.alone(), seed=3, dtype=dtype, **options)
    names = {parameter: name for name, parameter in model.stages[0].named_parameters()}
    ready: list[str] = []

    def is_ready(parameter: nn.Parameter) -> None:
        ready.append(names[parameter])

    def loss(head: Head, inputs: LossInputs) -> TokenLoss:
        return head.token_loss(inputs, LossSpec(), normalizer=50.0, as_it_is=as_it_is)

    data_parallel = model.data_parallel
    data_parallel.begin(data_parallel.gradients)
    model.pipeline.forward_backward(
        microbatches(config.vocab_size), loss, on_gradient_ready=is_ready
    )
    return {n: p.grad.clone() for p, n in names.items() if p.grad is not None}, ready


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["olmo2", "llama3", "qwen2", "qwen3", "gemma2"])
def test_gradients_are_those_of_autograd_and_each_is_announced_once(
    family: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, announced = trained(family, torch.float64, recompute=recompute)
    monkeypatch.setattr(weight_gradient, "DEVICES", {"cpu"})
    found, ready = trained(family, torch.float64, recompute=recompute)
    assert sorted(ready) == sorted(announced) == sorted(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14, msg=name)
    matrices = [n for n in ready if n.startswith("layers.") and "norm" not in n]
    layers = [int(name.split(".")[1]) for name in matrices]
    assert layers == sorted(layers, reverse=True)  # as backward comes to them, not at the end


def test_bf16_gradients_come_nearer_to_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def gap(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
        name = "layers.0.mlp.down.weight"
        return float((found[name].double() - exact[name]).norm() / exact[name].norm())

    exact, _ = trained("llama3", torch.float64)
    before, _ = trained("llama3", torch.bfloat16)
    monkeypatch.setattr(weight_gradient, "DEVICES", {"cpu"})
    after, _ = trained("llama3", torch.bfloat16)
    assert after["layers.0.mlp.down.weight"].dtype == torch.float32
    assert gap(after, exact) <= 1.02 * gap(before, exact)
    assert not torch.equal(after["layers.0.mlp.down.weight"], before["layers.0.mlp.down.weight"])


def test_only_a_loss_that_is_returned_as_it_is_adds_the_heads_gradient_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_gradient, "DEVICES", {"cpu"})
    whole, ready = trained("llama3", torch.float64)
    other, later = trained("llama3", torch.float64, as_it_is=False)
    assert ready[0] == later[0] == "head.weight"
    torch.testing.assert_close(whole["head.weight"], other["head.weight"], rtol=1e-12, atol=1e-14)


def test_a_loss_that_was_changed_behind_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradient, "DEVICES", {"cpu"})
    token_loss = Head.token_loss

    def halved(self: Head, *given: Any, **named: Any) -> TokenLoss:
        found = token_loss(self, *given, **named)
        return TokenLoss(found.loss / 2, found.logprobs, found.entropy, found.metrics)

    monkeypatch.setattr(Head, "token_loss", halved)
    trained("llama3", torch.float64, as_it_is=False)
    with pytest.raises(ValueError, match="returned another loss than"):
        trained("llama3", torch.float64)


def test_outside_of_a_training_step_autograd_adds_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_gradient, "DEVICES", {"cpu"})
    config = small("llama3")
    model = build_model(config, Mesh.alone(), seed=3, dtype=torch.float64)
    part, stage = microbatches(config.vocab_size)[0], model.stages[0]

    def loss(head: Head, inputs: LossInputs) -> TokenLoss:
        assert head.weight_grad is None
        return head.token_loss(inputs, LossSpec(), normalizer=50.0, as_it_is=True)

    out = stage(part.tokens, loss_inputs=part.inputs, loss=loss)
    weight = stage.layers["0"].mlp.down.weight
    weight.grad.fill_(7)
    torch.autograd.grad(out, [weight])
    assert (weight.grad == 7).all()
