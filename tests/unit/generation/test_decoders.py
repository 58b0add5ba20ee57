"""A decoder is chosen by what the built layers compute, and one that is wrong stops at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generation_cases import FAMILIES, engine, mixed_requests, prompt, recomputed, same_bits, small
from torch import Tensor, nn

from megarlx.generation.decoders import choose
from megarlx.generation.decoders.interface import WrongDecoder, checked_forward
from megarlx.generation.decoders.packed import PackedDecoder
from megarlx.generation.decoders.stage import StageDecoder
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.generation.rows import Rows, Sequence
from megarlx.hf.config_map import hugging_face_config
from megarlx.hf.errors import ConversionError
from megarlx.model import features, transformer_layer
from megarlx.model.core_attention import CoreAttention
from megarlx.model.kv_cache import PageTable
from megarlx.model.transformer import Stage
from megarlx.ops.elementwise import geglu, rms_norm
from megarlx.planning.job import Job
from megarlx.planning.memory import rank_memory

PLAIN = SamplingSettings()


def relu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.relu(gate) * up


def other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return transformer_layer.rope.rotate(x, cos, -sin)


class DoubledNorm(nn.Module):
    def __init__(self, like: Any) -> None:
        super().__init__()
        self.eps, self.weight = like.eps, like.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(2 * x, self.weight, 0.3, residual)


class HalvedCore(CoreAttention):
    def forward(self, q: Tensor, *rest: Any) -> Tensor:
        return super().forward(q * 0.5, *rest)


def swap_core(layer: Any) -> None:
    made = layer.attention.core
    layer.attention.core = HalvedCore(4, 2, 10, layer_number=1, form=made.form, kind="auto")


def swap_function(layer: Any) -> None:
    core = layer.attention.core
    kept = core.attend
    core.attend = lambda q, k, v, **rest: kept(q * 0.5, k, v, **rest)


# What a line of transformer_layer.py could be changed to.
SWAPS: dict[str, Callable[[Any], None]] = {
    "activation": lambda layer: setattr(layer.mlp, "activation", relu_gate),
    "rotation": lambda layer: setattr(layer.attention, "rotate", other_way),
    "norm": lambda layer: setattr(layer, "mlp_norm", DoubledNorm(layer.mlp_norm)),
    "qk_norm": lambda layer: setattr(
        layer.attention, "q_norm", DoubledNorm(layer.attention.q_norm)
    ),
    "core": swap_core,
    "attention": swap_function,
}


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Every layer that is built from now on has something else in it."""

    def swap(name: str) -> None:
        made = transformer_layer.Layer.__init__

        def init(self: Any, *given: Any, **named: Any) -> None:
            made(self, *given, **named)
            SWAPS[name](self)

        monkeypatch.setattr(transformer_layer.Layer, "__init__", init)
        features._features_of.cache_clear()

    yield swap  # type: ignore[misc]
    features._features_of.cache_clear()


def stage_of(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Stage:
    return Stage(small(family, **changes), dtype=dtype).initialise_(5)


@pytest.mark.parametrize("name", SWAPS)
def test_a_swapped_part_decodes_through_stage(swapped: Callable, name: str) -> None:
    request = Request(prompt(9, 1), (4,), 12)
    plain = recomputed(stage_of("olmo2"), request, 4, 2)
    swapped(name)
    stage = stage_of("olmo2")
    kept = engine(stage)
    assert type(kept.decoders[0]) is StageDecoder
    (found,) = kept.generate([request], PLAIN, seed=2)
    expected = recomputed(stage, request, 4, 2)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected.logprobs, plain.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", SWAPS)
def test_plans_and_conversions_refuse_a_swapped_part(swapped: Callable, name: str) -> None:
    config = small("olmo2")
    job = Job(config, 4, 1, 32, on_gpu=False, precision="fp32")
    rank_memory(job, 0)
    hugging_face_config(config, "float32")
    swapped(name)
    with pytest.raises(ValueError, match="plan: the layers are built with"):
        rank_memory(job, 0)
    with pytest.raises(ConversionError, match="Olmo2ForCausalLM does not compute what"):
        hugging_face_config(config, "float32")


def test_a_swapped_activation_decodes_through_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one that ships too, in the table of transformer_layer.py: plans know what it keeps, and a
    config.json would name another."""
    assert type(engine(stage_of("llama3")).decoders[0]) is PackedDecoder
    features._features_of.cache_clear()
    monkeypatch.setitem(transformer_layer.ACTIVATIONS, "silu", geglu)
    stage = stage_of("llama3")
    assert choose.decoder_of(stage) is StageDecoder
    request = Request(prompt(9, 1), (4,), 12)
    (found,) = engine(stage).generate([request], PLAIN, seed=2)
    assert torch.equal(found.tokens, recomputed(stage, request, 4, 2).tokens)
    rank_memory(Job(stage.config, 4, 1, 32, on_gpu=False, precision="fp32"), 0)
    with pytest.raises(ConversionError, match=r"MLP.activation=ops.elementwise.geglu"):
        hugging_face_config(stage.config, "float32")
    features._features_of.cache_clear()
    monkeypatch.undo()
    theirs = hugging_face_config(small("llama3", activation="gelu_tanh"), "float32")
    assert theirs["hidden_act"] == "gelu_pytorch_tanh"


def lying(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    everything = PackedDecoder.implements | features.features(stage)  # type: ignore[operator]
    monkeypatch.setattr(PackedDecoder, "implements", everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SWAPS)
def test_a_wrong_decoder_is_found_at_once(
    swapped: Callable, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    swapped(name)
    stage = stage_of("olmo2", dtype)
    lying(monkeypatch, stage)
    kept = engine(stage)
    assert type(kept.decoders[0]) is PackedDecoder
    for _ in range(2):  # and it is not forgotten
        with pytest.raises(WrongDecoder, match=r"PackedDecoder is .* nats off StageDecoder"):
            kept.generate(mixed_requests(2, 2), PLAIN, seed=1)
        assert kept.counts.steps == 0


def test_what_is_off_by_little_more_than_rounding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 a norm whose eps is 1e-5 instead of 1e-6 shows."""
    stage = stage_of("llama3", norm_eps=1e-5)
    kept = engine(stage)
    for layer in stage.layers.values():
        layer.mlp_norm.eps = 1e-6
    with pytest.raises(WrongDecoder):
        kept.generate(mixed_requests(2, 2), PLAIN, seed=1)


def test_a_stage_without_a_head_is_compared_by_its_hidden_states() -> None:
    stage = Stage(small("olmo2"), last=2, dtype=torch.float32).initialise_(5)
    cache = stage.kv_cache(PageTable.of_slots(5, 16))
    rows = Rows(4, 4, torch.device("cpu"))
    for row in range(3):
        rows.put(row, Sequence(row, row, Request(prompt(1, row), [], 3), row), row)
    fast, slow = PackedDecoder(stage, cache, 4), StageDecoder(stage, cache, 4)
    with torch.inference_mode():
        fast.begin()
        checked_forward(fast, slow, rows, 3)
        stage.layers["1"].mlp.activation = relu_gate
        with pytest.raises(WrongDecoder, match="of the largest hidden state off StageDecoder"):
            checked_forward(fast, slow, rows, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_changes_no_sample(family: str) -> None:
    stage = stage_of(family, torch.float32)
    compared, trusted = engine(stage), engine(stage)
    assert set(compared.unchecked) == ({0} if not family.startswith("gemma") else set())
    trusted.unchecked.clear()
    requests = mixed_requests(4, 4)
    found = compared.generate(requests, PLAIN, seed=1)
    assert not compared.unchecked
    assert same_bits(found, trusted.generate(requests, PLAIN, seed=1))


def test_what_is_no_number_in_the_model_is_no_decoders_fault() -> None:
    stage = stage_of("olmo2", torch.float32)
    with torch.no_grad():
        stage.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="no token can be drawn"):
        engine(stage).generate(mixed_requests(1, 1), PLAIN, seed=1)


def test_an_unknown_attribute_is_an_unknown_feature() -> None:
    """A switch, a function, a number, a module or a parameter that nobody has heard of."""
    for value in (True, "on", 3, None, geglu, nn.Identity(), nn.Parameter(torch.zeros(2))):
        stage = stage_of("qwen3")
        assert choose.decoder_of(stage) is PackedDecoder
        stage.layers["1"].mlp.news = value
        assert choose.decoder_of(stage) is StageDecoder, value


def test_ranks_with_a_part_of_the_heads_have_a_decoder_of_their_own() -> None:
    stage = stage_of("olmo2")
    split = features.features(stage) - {"Stage.splits_heads=False"} | {"Stage.splits_heads=True"}
    fits = [d.__name__ for d in choose.DECODERS if d.implements is None or split <= d.implements]
    assert fits == ["FusedDecoder", "StageDecoder"]
