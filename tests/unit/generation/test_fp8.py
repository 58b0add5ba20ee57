"""Decode products with weights in fp8: their twin in plain torch, and when they are taken.

The decoder of a card is given to engines of the CPU here.

Letters: W rows, K columns, N outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generation_cases import small, small_stage
from pydantic import ValidationError
from torch import Tensor

from megarlx.comm.groups import Mesh
from megarlx.config import Config, ConfigError, load_config
from megarlx.config.distill import DistillConfig
from megarlx.config.evaluation import SuiteConfig
from megarlx.config.families import listed
from megarlx.config.own_samples import FP8_GENERATOR
from megarlx.generation import fp8
from megarlx.generation.decoders import choose, in_place
from megarlx.generation.decoders.fp8 import Fp8Products, Fp8Rows, scaled_product_
from megarlx.generation.decoders.in_place import InPlaceDecoder
from megarlx.generation.decoders.interface import WrongDecoder
from megarlx.generation.decoders.stage import StageDecoder
from megarlx.generation.engine import Engine
from megarlx.generation.interface import generator_of
from megarlx.generation.requests import Completion, Request, SamplingSettings
from megarlx.model.build import build_model
from megarlx.model.transformer import Stage
from megarlx.ops.e4m3 import e4m3_rows_reference
from megarlx.planning.job import Job
from megarlx.planning.memory import rank_memory
from megarlx.planning.pieces import Rollouts
from megarlx.planning.stages import job_of_stage
from megarlx.run import make_objectives
from megarlx.run.directory import RunError
from megarlx.run.make_objectives import ObjectiveMaker

DTYPES = [torch.float32, torch.float64]
SETTINGS = SamplingSettings(stop_tokens=(11, 60))


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


@pytest.fixture
def in_place_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    implements = InPlaceDecoder.implements
    assert implements is not None
    monkeypatch.setattr(choose, "DECODERS", (InPlaceDecoder, StageDecoder))
    monkeypatch.setattr(InPlaceDecoder, "implements", implements | listed(Stage="device=cpu"))


def test_channels_that_are_zero_stay_so_and_such_without_numbers_are_seen() -> None:
    weight = normal(4, 16)
    weight[1] = 0
    weight[2, 5], weight[3, 6] = torch.nan, torch.inf
    kept = Fp8Rows.like(weight).take_(weight)
    out = torch.empty(2, 4, dtype=torch.float64)
    for x in (normal(2, 16, seed=1), normal(2, 16, seed=2)):
        scaled_product_(x, kept, out)
        assert out[:, 0].isfinite().all()
        assert (out[:, 1] == 0).all()
        assert not out[:, 2:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most_rows", [16, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_that_of_what_was_e4m3_rows_reference(
    dtype: torch.dtype, most_rows: int, with_bias: bool
) -> None:
    """Few rows by rounded weights; more rows are rounded too."""
    x, weight = normal(9, 64, dtype=dtype), normal(24, 64, dtype=dtype, seed=1)
    bias = normal(24, dtype=dtype, seed=2) if with_bias else None
    values, scales = e4m3_rows_reference(weight)
    wide = values.double() * scales.double()[:, None]
    rows = x.double()
    if most_rows == 64:
        of_rows, scales_of_rows = e4m3_rows_reference(x)
        rows = of_rows.double() * scales_of_rows.double()[:, None]
    expected = rows @ wide.t() + (0 if bias is None else bias.double())
    out = torch.empty(9, 24, dtype=dtype)
    Fp8Products(most_rows).by("0.qkv", weight, bias)(x, out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    apart = (out.double() - exact).norm() / exact.norm()
    assert 5e-3 < apart < 6e-2


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch has it on GPUs alone")
def test_the_twin_is_torch_s_scaled_product() -> None:
    """Which rounds its result to bf16."""
    x, weight = (normal(n, 64).bfloat16().float() for n in (32, 48))
    kept = Fp8Rows.like(weight).take_(weight)
    values, scales = e4m3_rows_reference(x)
    by_row = torch.nn.functional.ScalingType.RowWise
    theirs = torch.nn.functional.scaled_mm(
        *(values, kept.values.t(), scales[:, None], by_row, kept.scales[None], by_row)
    )
    out = torch.empty(32, 48, dtype=torch.float64)
    scaled_product_(x.double(), kept, out)
    torch.testing.assert_close(theirs.double(), out, rtol=1e-2, atol=1e-2)


def test_weights_are_rounded_anew_into_the_same_memory_whenever_a_generation_begins() -> None:
    weight, products = normal(24, 64), Fp8Products(16)
    x, out = normal(3, 64, seed=1), torch.empty(3, 24, dtype=torch.float64)
    products.by("0.o", weight)
    place = products.kept["0.o"].values.data_ptr()
    weight.mul_(2).add_(1)
    products.by("0.o", weight)(x, out)
    assert products.kept["0.o"].values.data_ptr() == place
    expected = torch.empty_like(out)
    Fp8Products(16).by("0.o", weight)(x, expected)
    assert torch.equal(out, expected)


def test_the_head_keeps_its_precision() -> None:
    weight, x = normal(24, 64), normal(3, 64, seed=1)
    out = torch.empty(3, 24, dtype=torch.float64)
    Fp8Products(16).by("head", weight)(x, out)
    assert torch.equal(out, torch.mm(x, weight.t()))


def of_rounded_weights(stage: Stage) -> Stage:
    """The same stage with its layers' matrices rounded: what fp8 decoding should compute."""
    twin = Stage(stage.config, dtype=torch.float64).initialise_(1)
    with torch.no_grad():
        for (name, target), source in zip(twin.named_parameters(), stage.parameters(), strict=True):
            target.copy_(source)
            if target.dim() == 2 and name.startswith("layers."):
                values, scales = e4m3_rows_reference(source)
                target.copy_(values.double() * scales.double()[:, None])
    return twin


def drawn(kept: Engine) -> list[Completion]:
    """Prompts of one token: the first decode step takes it, and no cache is filled otherwise."""
    requests = [Request([7 + g], [3 * g, 3 * g + 1], 12) for g in range(4)]
    return kept.generate(requests, SETTINGS, seed=3)


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_an_engine_in_fp8_draws_what_its_rounded_weights_draw() -> None:
    stage = small_stage("olmo2", torch.float64)
    kept = Engine([stage], slots=3, longest=64, fp8=True)
    for _ in range(2):
        found = drawn(kept)
        twin = drawn(Engine([of_rounded_weights(stage)], slots=3, longest=64))
        for x, y in zip(found, twin, strict=True):
            assert x.tokens.tolist() == y.tokens.tolist()
            torch.testing.assert_close(x.logprobs, y.logprobs, rtol=1e-5, atol=1e-5)
        assert apart(found, drawn(Engine([stage], slots=3, longest=64))) > 1e-4
        with torch.no_grad():  # as training moves them between rollouts
            for parameter in stage.parameters():
                parameter.mul_(1.2)
    assert not kept.exact


@pytest.mark.usefixtures("in_place_on_a_cpu")
@pytest.mark.parametrize("family", ["olmo2", "llama3"])
def test_plans_count_the_rounded_copies(family: str) -> None:
    stage = small_stage(family)
    kept = Engine([stage], slots=3, longest=64, fp8=True)
    drawn(kept)
    (decoder,) = kept.decoders
    assert isinstance(decoder, InPlaceDecoder)
    assert isinstance(decoder.products, Fp8Products)
    copies = decoder.products.kept.values()
    held = sum(one.values.nbytes + one.scales.nbytes for one in copies)
    job = Job(stage.config, 1, 1, 64, on_gpu=False)
    planned = [rank_memory(job, 0, Rollouts(3, 32, 32, fp8=fp8)).weights for fp8 in (True, False)]
    assert planned[0] - planned[1] == held


def test_a_plan_reads_the_generator() -> None:
    options = {"prompts": "x.jsonl", "policy": {"importance_cap": 2.0}}
    shape = {"family": "olmo2", "vocab_size": 96, "hidden_size": 32, "layers": 2, "heads": 2}
    config, rounded = (
        Config.model_validate(
            {
                "model": {**shape, "intermediate_size": 64, "max_sequence_length": 64},
                "training": {"sequence_length": 32},
                "template": {"user": "{content}"},
                "rl": {**options, "max_completion_tokens": 16, "generator": generator},
                "stages": [{"objectives": {"rl": {"lr": 1e-6}}, "steps": 1}],
            }
        )
        for generator in ("engine", FP8_GENERATOR)
    )
    weights = [rank_memory(job_of_stage(c, 1, 0), 0).weights for c in (config, rounded)]
    assert weights[0] < weights[1] < 1.6 * weights[0]


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_more_slots_round_the_rows_too_and_log_probs_stay_near() -> None:
    stage = small_stage("olmo2", torch.float64)
    few, many, plain = (
        drawn(Engine([stage], slots=slots, longest=64, fp8=fp8))
        for slots, fp8 in ((3, True), (40, True), (40, False))
    )
    assert 0 < apart(many, few) < 0.3
    assert 0 < apart(many, plain) < 0.3


def apart(a: list[Completion], b: list[Completion]) -> float:
    """The mean gap of log-probs over the first tokens, while they are the same."""
    gaps = []
    for x, y in zip(a, b, strict=True):
        same = min(len(x.tokens), len(y.tokens))
        until = next((i for i in range(same) if x.tokens[i] != y.tokens[i]), same)
        gaps += [
            abs(float(p) - float(q))
            for p, q in zip(x.logprobs[:until], y.logprobs[:until], strict=True)
        ]
    return sum(gaps) / len(gaps)


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_a_wrong_step_is_found_before_it_is_hidden_by_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        in_place, "decode_swiglu_", lambda gate_up, out: out.copy_(gate_up[:, : out.shape[1]])
    )
    with pytest.raises(WrongDecoder, match="InPlaceDecoder is"):
        drawn(Engine([small_stage()], slots=4, longest=64, fp8=True))


def test_what_does_not_decode_in_place_is_refused_with_what_it_has() -> None:
    assert "does not serve Stage.device=cpu" in fp8.without_fp8(small_stage("llama3"))


@pytest.mark.usefixtures("in_place_on_a_cpu")
def test_sizes_that_are_no_multiples_of_16_are_refused_by_name() -> None:
    stage = Stage(small("llama3", intermediate_size=40), dtype=torch.float32)
    found = fp8.without_fp8(stage)
    assert found.startswith("layers.0.")
    assert found.endswith("allowed: multiples of 16")


@pytest.mark.usefixtures("in_place_on_a_cpu")
@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((8, 0), torch.bfloat16, "A100 has compute capability 8.0; allowed: 9.0 or more"),
        ((9, 0), torch.float32, "the weights are torch.float32; allowed: torch.bfloat16"),
        ((10, 0), torch.bfloat16, ""),
    ],
)
def test_cards_before_sm_90_and_other_types_are_refused(
    capability: tuple[int, int], dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")

    class OnCard:
        device = torch.device("cuda")

    some: Any = OnCard()
    some.dtype = dtype
    assert fp8._unfit_card(some) == message


RL = """
[model]
vocab_size = 97
hidden_size = 64
heads = 4
layers = 1
intermediate_size = 128

[training]
sequence_length = 32

[data]
maker = "world"
folder = "made"

[template]
user = "Q: {content}"

[[stages]]
steps = 2
objectives = { rl = { lr = 1e-6 } }

[rl]
generator = "engine_fp8"
policy = { importance_cap = 2.0 }
"""


def config_of(folder: Path, *overrides: str) -> Config:
    path = folder / "run.toml"
    path.write_text(RL)
    return load_config(path, overrides)


def test_a_machine_that_cannot_is_refused_when_the_objective_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_objectives, "data_of", lambda config: config.data)
    config = config_of(tmp_path)
    model = build_model(config.model, Mesh.alone(), seed=1)
    maker = ObjectiveMaker(config, model, None, torch.device("cpu"), tmp_path)
    said = r"rl\.generator is 'engine_fp8', but it .* Stage\.device=cpu.*; allowed here: 'engine'"
    with pytest.raises(RunError, match=said):
        maker["rl"]


def test_rollouts_in_fp8_without_a_cap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rl\.generator .* needs policy\.importance_cap"):
        config_of(tmp_path, "rl.policy={}")


def test_what_corrects_for_nothing_is_refused() -> None:
    said = "is 'engine_fp8', which is for rl; allowed: 'engine'"
    with pytest.raises(ValidationError, match=said):
        SuiteConfig(name="a", kind="pass_at_k", made="problems", generator="engine_fp8")
    with pytest.raises(ValidationError, match=said):
        DistillConfig(teachers=("run@1",), generator="engine_fp8")


def test_the_generator_is_called_by_name_and_refuses_too(tmp_path: Path) -> None:
    model = build_model(small("llama3"), Mesh.alone(), seed=1)
    with pytest.raises(ValueError, match=r"generator is 'engine_fp8', but it decodes in place"):
        generator_of("engine_fp8", model, slots=2, longest=8)
