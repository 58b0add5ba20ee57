"""What `auto` becomes on a machine, and what of it a run keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chosen_configs import config as small_config

from megarlx.choices import Machine, Needs, Package, choose_attention, choose_layers
from megarlx.config import Config, as_asked, load_config
from megarlx.config.objectives import PRETRAINING
from megarlx.config.stages import StageObjective
from megarlx.run.choose import choose
from megarlx.run.directory import RunDirectory, RunError

CPU = Machine()
BARE = Machine("NVIDIA H100", (9, 0))
FLASH = Machine("NVIDIA H100", (9, 0), flash_attention=Package("2"))
WHOLE = Machine("NVIDIA H100", (9, 0), Package("2.12.0"), Package("2"))
BROKEN = Machine("NVIDIA H100", (9, 0), Package(error="undefined symbol: x"), Package("2"))
OLD = Machine("NVIDIA V100", (7, 0), Package("2.12.0"), Package("2"))
KEYS = ("precision", "layers", "attention")


def config(**training: object) -> Config:
    more = {"rl": {"prefill_tokens": 77}}
    return small_config(beside={"rl": {}, "objectives": {"more": more}}, **training)


def values(made: Config) -> tuple[str, ...]:
    return tuple(getattr(made.training, key) for key in KEYS)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (CPU, ("fp32", "torch", "sdpa")),
        (BARE, ("bf16", "torch", "sdpa")),
        (FLASH, ("bf16", "torch", "flash")),
        (WHOLE, ("bf16", "te", "cudnn")),
        (BROKEN, ("bf16", "torch", "flash")),
        (OLD, ("fp32", "torch", "sdpa")),
    ],
    ids=["CPU", "bare", "flash-attn", "whole", "broken", "old"],
)
def test_a_machine_gets_the_fastest_that_it_has(machine: Machine, expected: tuple) -> None:
    chosen = choose(config(), machine)
    assert values(chosen.config) == expected
    for key, value in zip(KEYS, expected, strict=True):
        choice = chosen.choices[f"training.{key}"]
        assert choice.value == value
        assert choice.why


def test_what_was_given_is_kept_and_is_no_choice() -> None:
    given = config(precision="fp32", layers="te", attention="sdpa")
    chosen = choose(given, WHOLE)
    assert values(chosen.config) == ("fp32", "te", "sdpa")
    assert not any(key.startswith("training.") for key in chosen.choices)


@pytest.mark.parametrize(
    ("given", "machine", "said"),
    [
        ({"layers": "te"}, CPU, r"layers is 'te', but Transformer Engine runs on GPUs alone"),
        ({"layers": "te"}, FLASH, r"Transformer Engine is not installed; allowed here: 'auto'"),
        ({"layers": "te"}, BROKEN, r"does not import \(undefined symbol: x\); see megarlx doctor"),
        ({"attention": "flash"}, BARE, r"attention is 'flash', but flash-attn is not installed"),
        ({"attention": "cudnn"}, OLD, r"'cudnn', but Transformer Engine's attention is for bf16"),
        ({"fp8": "current"}, FLASH, r"fp8 is 'current'; .*layers = torch: .* is not installed"),
        ({"fp8": "current"}, CPU, r"fp8 is 'current'; .*precision = fp32: this is a CPU"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(
    given: dict[str, str], machine: Machine, said: str
) -> None:
    with pytest.raises(RunError, match=said):
        choose(config(**given), machine)


def test_layers_and_attention_must_serve_the_model() -> None:
    wide = Needs("bf16", head_dim=192)
    assert choose_layers(WHOLE, wide).value == "torch"
    assert choose_attention(WHOLE, wide).value == "flash"
    odd = Needs("bf16", head_dim=20)
    assert choose_attention(WHOLE, odd).value == "sdpa"
    assert "20; for cudnn allowed are multiples of 8" in choose_attention(WHOLE, odd).why
    assert choose_layers(WHOLE, Needs("bf16", 64, splits_backward=True)).value == "torch"
    assert choose_attention(WHOLE, Needs("fp32", 64)).value == "sdpa"


def test_prefills_suit_the_device_and_a_given_number_wins() -> None:
    for machine, tokens in ((CPU, 1024), (BARE, 16_384)):
        made = choose(config(), machine).config
        assert made.rl is not None
        assert made.objectives["more"].rl is not None
        assert made.rl.prefill_tokens == made.evaluation.prefill_tokens == tokens
        assert made.objectives["more"].rl.prefill_tokens == 77


@pytest.mark.parametrize("machine", [CPU, WHOLE], ids=["CPU", "GPU"])
def test_a_run_that_goes_on_keeps_the_precision_it_began_with(machine: Machine) -> None:
    began = {"training.precision": "bf16", "training.layers": "torch"}
    chosen = choose(config(), machine, began)
    assert chosen.config.training.precision == "bf16"
    assert chosen.config.training.layers == "torch"
    assert chosen.choices["training.precision"].value == "bf16"


def test_a_run_that_goes_on_keeps_layers_and_attention_where_it_can() -> None:
    began = {
        "training.precision": "bf16",
        "training.layers": "te",
        "training.attention": "flash",
    }
    assert values(choose(config(), WHOLE, began).config) == ("bf16", "te", "flash")
    assert values(choose(config(), BARE, began).config) == ("bf16", "torch", "sdpa")
    assert values(choose(config(), CPU, began).config) == ("bf16", "torch", "sdpa")


def described(path: Path, machine: Machine) -> RunDirectory:
    """A run that began on a machine."""
    directory = RunDirectory(path)
    chosen = choose(config(), machine)
    reasons = {key: str(choice) for key, choice in chosen.choices.items()}
    directory.write_description(chosen.config, path / "none.json", chosen=reasons)
    return directory


def test_resolved_json_shows_what_was_chosen_and_why(tmp_path: Path) -> None:
    described(tmp_path, WHOLE)
    saved = json.loads((tmp_path / "resolved.json").read_text())
    assert saved["training"]["precision"] == "bf16"
    assert saved["rl"]["prefill_tokens"] == 16_384
    assert saved["chosen"]["training.precision"] == "bf16: NVIDIA H100 computes in it"
    assert saved["chosen"]["training.layers"] == "te: Transformer Engine 2.12.0 is here"
    assert "objectives.more.rl.prefill_tokens" not in saved["chosen"]


def test_who_starts_from_a_run_keeps_its_precision_and_chooses_the_rest(tmp_path: Path) -> None:
    """As an excursion, an evaluation and a plan do."""
    described(tmp_path, WHOLE)
    read = load_config(tmp_path / "resolved.json")
    assert values(read) == ("bf16", "auto", "auto")
    assert read.rl is not None
    assert read.rl.prefill_tokens is read.evaluation.prefill_tokens is None
    assert read.objectives["more"].rl.prefill_tokens == 77
    assert values(choose(read, CPU).config) == ("bf16", "torch", "sdpa")


def test_a_run_goes_on_where_only_what_the_machine_chooses_differs(tmp_path: Path) -> None:
    directory = described(tmp_path, WHOLE)
    directory.check_same_run(choose(config(precision="bf16"), CPU).config)
    with pytest.raises(RunError, match=r'training\.precision: was "bf16", is "fp32"'):
        directory.check_same_run(choose(config(), CPU).config)


def test_an_experiment_is_the_same_on_two_machines(tmp_path: Path) -> None:
    """As far as its precision is: the report tells runs apart by what is left here."""
    texts = []
    for name, machine in (("cpu", CPU), ("old", OLD), ("whole", WHOLE)):
        described(tmp_path / name, machine)
        texts.append(as_asked(json.loads((tmp_path / name / "resolved.json").read_text())))
    assert texts[0] == texts[1]
    assert texts[0]["training"].pop("precision") == "fp32"
    assert texts[2]["training"].pop("precision") == "bf16"
    assert texts[0] == texts[2]


def test_what_a_stage_says_of_objectives_is_left_alone() -> None:
    given = config()
    made = choose(given, WHOLE).config
    assert made.all_stages[0].objectives == given.all_stages[0].objectives
    assert isinstance(made.all_stages[0].objectives[PRETRAINING], StageObjective)
