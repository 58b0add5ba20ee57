"""Transformer Engine's layers, with a stand-in for it: how they decode and add gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small
from te_stand_in import transformer_engine  # noqa: F401  a fixture
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.config.families import listed
from megarlx.generation.decoders import choose
from megarlx.generation.decoders.in_place import InPlaceDecoder
from megarlx.generation.decoders.stage import StageDecoder
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.model.build import build_model
from megarlx.model.transformer import Stage
from megarlx.ops import Head, LossInputs, LossSpec, TokenLoss, weight_gradient
from megarlx.parallel.microbatches import Microbatch

pytestmark = pytest.mark.usefixtures("transformer_engine")
NATIVE = ("olmo2", "llama3", "qwen2", "qwen3")


def drawn(stage: Stage) -> list[list[int]]:
    requests = [Request(list(range(1 + g, 6 + 2 * g)), [3 * g, 3 * g + 1], 9) for g in range(3)]
    kept = Engine([stage], slots=4, longest=40)
    settings = SamplingSettings(stop_tokens=(11, 60, 71))
    return [c.tokens.tolist() for c in kept.generate(requests, settings, seed=2)]


@pytest.mark.parametrize("attention", ["auto", "cudnn"])
@pytest.mark.parametrize("backend", ["torch", "te"])
@pytest.mark.parametrize("family", NATIVE)
def test_the_weights_of_either_backend_decode_in_place(
    family: str, backend: str, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"backend": backend, "attention": attention, "dtype": torch.float64}
    stage = Stage(small(family), **options).initialise_(4)
    monkeypatch.setattr(choose, "DECODERS", (StageDecoder,))
    expected = drawn(stage)
    implements = InPlaceDecoder.implements
    assert implements is not None
    monkeypatch.setattr(InPlaceDecoder, "implements", implements | listed(Stage="device=cpu"))
    monkeypatch.setattr(choose, "DECODERS", (InPlaceDecoder, StageDecoder))
    assert choose.decoder_of(stage) is InPlaceDecoder
    assert drawn(stage) == expected
    plain = Stage(small(family), dtype=torch.float64).initialise_(4)
    assert drawn(plain) == expected


def test_norms_of_one_plus_weight_and_fp8_decode_through_the_layers() -> None:
    assert choose.decoder_of(Stage(small("gemma2"), backend="te")) is StageDecoder
    assert choose.decoder_of(Stage(small("llama3"), backend="te", fp8="current")) is StageDecoder


def trained(family: str, recompute: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients by name, and the names in the order in which they were said to be complete."""
    config = small(family)
    model = build_model(
        config, Mesh.alone(), seed=3, backend="te", dtype=torch.float64, recompute=recompute
    )
    names = {parameter: name for name, parameter in model.stages[0].named_parameters()}
    draw, ready = torch.Generator().manual_seed(1), []
    tokens = [torch.randint(config.vocab_size, (2, 10), generator=draw) for _ in range(3)]
    parts = [Microbatch(t[:, :-1], LossInputs(t[:, 1:].contiguous())) for t in tokens]

    def loss(head: Head, inputs: LossInputs) -> TokenLoss:
        return head.token_loss(inputs, LossSpec(), normalizer=50.0, as_it_is=True)

    model.data_parallel.begin(model.data_parallel.gradients)
    model.pipeline.forward_backward(parts, loss, on_gradient_ready=lambda p: ready.append(names[p]))
    return {n: p.grad.clone() for p, n in names.items() if p.grad is not None}, ready


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", ["olmo2", "qwen2"])
def test_weight_gradients_are_added_to_the_buffer_and_announced(
    family: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, announced = trained(family, recompute)
    monkeypatch.setattr(weight_gradient, "DEVICES", {"cpu"})
    found, ready = trained(family, recompute)
    assert sorted(ready) == sorted(announced) == sorted(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-13, msg=name)
