"""`megarlx transplant` and `megarlx merge`: sums of weights, from and to any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_branch_command import TRUNK as BRANCHED
from torch import Tensor
from training_runs import ROOT, tool, train

import megarlx
from megarlx.cli import main
from megarlx.data.tokenizer import WordTokenizer, load_tokenizer
from megarlx.hf.sources import CheckpointSource
from megarlx.hf.trunk import find_checkpoint
from megarlx.run import transplant as transplants
from megarlx.training.metrics import read_metrics

TRUNK = (
    BRANCHED
    + """
validation_sequences = 4
[[evaluation.suites]]
name = "math"
kind = "pass_at_k"
made = "problems"
questions = 8
samples = 4
ks = [1, 2]
max_new_tokens = 8
[[evaluation.suites]]
name = "validation"
kind = "pass_at_k"
made = "problems"
split = "validation"
questions = 6
samples = 2
ks = [1]
max_new_tokens = 8
form = "answer_format"
"""
)
SFT = ROOT / "configs" / "recipes" / "sft.toml"
SHORT = (
    "stages.0.steps=3",
    "stages.0.objectives.sft.warmup_steps=1",
    "evaluation.at_end=false",
    "logging.validation_sequences=4",
)


def words(*settings: str) -> list[str]:
    return [word for one in settings for word in ("--set", one)]


def branch(reference: str, out: Path, *settings: str, recipe: Path = SFT) -> int:
    return main(["branch", reference, str(recipe), "--out", str(out), *words(*SHORT, *settings)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk at 4 and 8, two excursions from 4, and the trunk of another model."""
    folder = tmp_path_factory.mktemp("transplant")
    config = folder / "trunk.toml"
    config.write_text(TRUNK.format(world=folder / "world"))
    assert train(config, folder / "trunk") == 0
    assert train(config, folder / "wide", "model.intermediate_size=48", "training.steps=4") == 0
    for name, seed in (("one", 0), ("two", 1)):
        assert branch(f"{folder / 'trunk'}@4", folder / name, f"training.seed={seed}") == 0
    return folder


def transplant(runs: Path, out: Path, *rest: str, of: tuple[str, ...] = ("one",)) -> int:
    excursions = [str(runs / name) for name in of]
    onto = ["--onto", f"{runs / 'trunk'}@8"]
    return main(["transplant", *excursions, *onto, "--out", str(out), *rest])


def weights(reference: str) -> dict[str, Tensor]:
    source = CheckpointSource(find_checkpoint(reference))
    names = [name for name in source.shapes if "/" not in name]
    return {n: source.read(n, (0,) * len(source.shapes[n]), source.shapes[n]) for n in names}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def formula(base: str, *terms: tuple[float, str, str]) -> dict[str, Tensor]:
    found = {name: values.double() for name, values in weights(base).items()}
    for alpha, plus, minus in terms:
        more, less = weights(plus), weights(minus)
        for name in found:
            found[name] = found[name] + alpha * (more[name].double() - less[name].double())
    return {name: values.float() for name, values in found.items()}


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("layout", ["2,1,1", "1,2,1", "1,1,2"])
def test_a_transplant_is_the_fp64_formula_bit_for_bit_in_any_layout(
    runs: Path, tmp_path: Path, layout: str
) -> None:
    for name in ("trunk", "one", "two"):
        for at in ("@4", "@8") if name == "trunk" else ("@latest",):
            convert = ["--from", "megarlx", "--to", "megarlx", f"{runs / name}{at}"]
            convert += [str(tmp_path / name), "--layout", layout, "--quiet"]
            assert tool("convert_checkpoint").main(convert) == 0
    trunk, one, two = (str(tmp_path / name) for name in ("trunk", "one", "two"))
    said = ["--alpha", "0.7,-1.3", "--from", f"{trunk}@4", "--layout", layout]
    assert transplant(tmp_path, tmp_path / "made", *said, of=("one", "two")) == 0
    expected = formula(
        f"{trunk}@8", (0.7, f"{one}@latest", f"{trunk}@4"), (-1.3, f"{two}@latest", f"{trunk}@4")
    )
    assert same_bits(weights(f"{tmp_path / 'made'}@8"), expected)
    files = list((tmp_path / "made" / "checkpoints" / "iter_00000008").glob("model-*"))
    assert len(files) == 2
    single = formula(f"{runs / 'trunk'}@8", (1.0, f"{runs / 'one'}@latest", f"{runs / 'trunk'}@4"))
    assert transplant(runs, tmp_path / "plain") == 0
    assert same_bits(weights(f"{tmp_path / 'plain'}@8"), single)
    assert not same_bits(single, weights(f"{runs / 'trunk'}@8"))


def test_controls_have_the_vectors_norm_and_not_its_place(runs: Path, tmp_path: Path) -> None:
    trunk, one = f"{runs / 'trunk'}", str(runs / "one")
    eight, four, changed = weights(f"{trunk}@8"), weights(f"{trunk}@4"), weights(one)
    vector = {n: changed[n].double() - four[n].double() for n in four}
    made = {}
    for change in ("permuted:3", "random:1", "random:2"):
        out = tmp_path / change.replace(":", "-")
        assert transplant(runs, out, "--change", change) == 0
        again = tmp_path / f"again-{out.name}"
        assert transplant(runs, again, "--change", change, "--layout", "2,1,2") == 0
        assert same_bits(weights(str(again)), weights(str(out)))
        made[change] = {n: w.double() - eight[n].double() for n, w in weights(str(out)).items()}
    for name, values in vector.items():
        other = name.replace("layers.0", "layers.x").replace("layers.1", "layers.0")
        other = other.replace("layers.x", "layers.1")
        assert torch.allclose(made["permuted:3"][name], vector[other], rtol=0, atol=1e-6)
        for change in ("random:1", "random:2"):
            norm = made[change][name].norm()
            torch.testing.assert_close(norm, values.norm(), rtol=1e-3, atol=1e-6)
    flat = [torch.cat([v.flatten() for v in m.values()]) for m in (vector, *made.values())]
    for control in flat[2:]:
        assert abs(torch.cosine_similarity(flat[0], control, dim=0)) < 0.1
    assert abs(torch.cosine_similarity(flat[2], flat[3], dim=0)) < 0.1


def test_alpha_0_is_the_checkpoint_itself(runs: Path, tmp_path: Path) -> None:
    assert transplant(runs, tmp_path / "made", "--alpha", "0") == 0
    assert same_bits(weights(f"{tmp_path / 'made'}@8"), weights(f"{runs / 'trunk'}@8"))


def test_a_transplant_has_one_checkpoint_no_moments_and_says_what_it_is_of(
    runs: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    assert transplant(runs, made, "--alpha", "0.5") == 0
    assert [p.name for p in sorted((made / "checkpoints").glob("iter_*"))] == ["iter_00000008"]
    checkpoint = find_checkpoint(str(made))
    assert {path.name for path in checkpoint.glob("*-*")} == {"model-00000.safetensors"}
    lineage = json.loads((made / "lineage.json").read_text())
    assert (lineage["parent"]["run"], lineage["parent"]["iteration"]) == (str(runs / "trunk"), 8)
    parts = {"base": f"{runs / 'trunk'}@8", "minus": f"{runs / 'trunk'}@4", "plus": runs / "one"}
    (term,) = lineage["sum"]["terms"]
    assert term["weight"] == 0.5
    for part, reference in parts.items():
        told = lineage["sum"]["base"] if part == "base" else term[part]
        manifest = CheckpointSource(find_checkpoint(str(reference))).manifest
        assert (told["digest"], told["iteration"]) == (manifest.digest, manifest.iteration)
    with megarlx.open(str(made)) as run:
        assert run.trunk_tokens == 8 * 4 * 128
        assert not run.is_base
        assert run.template is not None
        assert run.generate(["ann has 7 books"], max_new_tokens=2)


def test_what_a_transplant_is_of_is_kept_from_pruning(runs: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert transplant(runs, made) == 0
    for name, iteration in (("trunk", 8), ("trunk", 4), ("one", 3)):
        notes = (runs / name / "checkpoints" / "references").glob(f"iter_{iteration:08d}.*")
        assert str(made) in {json.loads(note.read_text())["by"] for note in notes}


def test_guessing_of_a_transplant_is_that_of_the_checkpoint_to_the_digit(
    runs: Path, tmp_path: Path
) -> None:
    assert transplant(runs, tmp_path / "made") == 0
    found = []
    for run in (tmp_path / "made", runs / "trunk"):
        assert main(["evaluate", f"{run}@8", "--suite", "math"]) == 0
        found.append(json.loads((run / "evaluations" / "iter_00000008.math.json").read_text()))
    assert found[0]["guessing"] == found[1]["guessing"]
    assert found[0]["settings"]["made"] == found[1]["settings"]["made"]
    assert found[0]["trunk_tokens"] == found[1]["trunk_tokens"]


def test_a_transplant_is_branched_from_but_nothing_goes_on_with_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    assert transplant(runs, made) == 0
    on = tmp_path / "on.toml"
    on.write_text("[[stages]]\nsteps = 1\n[stages.objectives.pretraining]\ninherit = true\n")
    assert branch(str(made), tmp_path / "late") == 0
    assert list(read_metrics(tmp_path / "late" / "metrics.jsonl"))[-1]["step"] == 3
    why = refusal(capsys, main(["branch", str(made), str(on), "--out", str(tmp_path / "x")]))
    assert "it is a transplant, of weights alone" in why
    config = runs / "trunk.toml"
    why = refusal(capsys, train(config, made))
    assert "is a transplant: weights were summed, which has no moments to go on with" in why


def test_the_tree_and_the_report_show_a_transplant_and_it_is_exported(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    for name, alpha in (("half", "0.5"), ("whole", "1")):
        assert transplant(runs, study / name, "--alpha", alpha) == 0
        assert main(["evaluate", str(study / name)]) == 0
    assert main(["evaluate", f"{runs / 'trunk'}@8"]) == 0
    capsys.readouterr()
    assert main(["tree", str(study)]) == 0
    shown = capsys.readouterr().out
    assert "half  transplant of one" in shown
    assert "step" not in shown.split("half")[1].split("math")[0]  # it has none to do
    page = megarlx.report_on(study)
    rows = json.loads((page.parent / "summary.json").read_text())["results"]
    recipes = {row["recipe"]: row["pass_at_1"] for row in rows}
    assert {"transplant (weights 0.5)", "transplant (weights 1)"} <= recipes.keys()
    assert None not in recipes.values()
    convert = ["--from", "megarlx", "--to", "hf", str(study / "half"), str(tmp_path / "hf")]
    assert tool("convert_checkpoint").main([*convert, "--quiet"]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert (tmp_path / "hf" / "chat_template.jinja").exists()  # it has learned to answer


def test_the_same_command_again_does_nothing_and_another_sum_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    assert transplant(runs, made) == 0
    before = weights(str(made))
    assert transplant(runs, made) == 0
    assert "there already" in capsys.readouterr().out
    assert same_bits(weights(str(made)), before)
    assert "holds another run" in refusal(capsys, transplant(runs, made, "--alpha", "0.5"))
    assert "holds another run" in refusal(capsys, transplant(runs, runs / "two"))


REFUSED = {
    "alpha is nan": ("--alpha", "nan"),
    "alpha is inf": ("--alpha", "inf"),
    "--alpha has 2 values for 1 excursions": ("--alpha", "1,2"),
    "--alpha is 'much'": ("--alpha", "much"),
    "--from has 2 values for 1 excursions": ("--from", "a", "--from", "b"),
    "--alpha and --alphas cannot": ("--alpha", "1", "--alphas", "1,2"),
    "--alphas and --match cannot": ("--alphas", "1,2", "--match", "{runs}/one"),
    "--suite is for --alphas and --match": ("--suite", "validation"),
    "--config is for --alphas and --match": ("--config", "suites.toml"),
    "with split = 'test'": ("--alphas", "1", "--suite", "math"),
    "--suite other: it is none": ("--alphas", "1", "--suite", "other"),
    "iteration 7 was not saved": ("--from", "{runs}/trunk@7"),
    "layout is '2'": ("--layout", "2"),
    "--change is 'shuffled'": ("--change", "shuffled"),
    "--change is a control": ("--change", "random:0", "--alphas", "1,2"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refusal_names_what_is_wrong_and_leaves_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    said = [word.format(runs=runs) for word in REFUSED[why]]
    assert why in refusal(capsys, transplant(runs, tmp_path / "x", *said))
    assert not (tmp_path / "x").exists()


def test_an_excursion_without_a_parent_needs_one_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why = refusal(capsys, transplant(runs, tmp_path / "x", of=("trunk",)))
    assert "knows no parent" in why
    said = ("--from", f"{runs / 'trunk'}@4")
    assert transplant(runs, tmp_path / "x", *said, of=("trunk",)) == 0
    trunk = f"{runs / 'trunk'}"
    assert same_bits(
        weights(f"{tmp_path / 'x'}"), formula(f"{trunk}@8", (1.0, f"{trunk}@8", f"{trunk}@4"))
    )


def test_another_model_and_another_tokenizer_are_refused_by_their_first_difference(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why = refusal(capsys, transplant(runs, tmp_path / "x", "--from", str(runs / "wide")))
    assert "model.intermediate_size is 48" in why
    assert "is 40" in why
    other = tmp_path / "other"
    convert = ["--from", "megarlx", "--to", "megarlx", str(runs / "one"), str(other), "--quiet"]
    assert tool("convert_checkpoint").main(convert) == 0
    words_ = list(load_tokenizer(runs / "one" / "tokenizer.json").words)
    changed = WordTokenizer([*words_[:-2], words_[-1], words_[-2]])
    changed.save(other / "tokenizer.json")
    excursion = ["transplant", str(other), "--onto", f"{runs / 'trunk'}@8"]
    why = refusal(capsys, main([*excursion, "--out", str(tmp_path / "x")]))
    assert "its tokenizer has the fingerprint" in why
    assert not (tmp_path / "x").exists()


def test_a_parent_that_was_replaced_is_no_start(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    convert = ["--from", "megarlx", "--to", "megarlx", str(runs / "one"), str(other), "--quiet"]
    assert tool("convert_checkpoint").main(convert) == 0
    lineage = json.loads((other / "lineage.json").read_text())
    lineage["parent"]["digest"] = "0" * 64
    (other / "lineage.json").write_text(json.dumps(lineage))
    excursion = ["transplant", str(other), "--onto", f"{runs / 'trunk'}@8"]
    why = refusal(capsys, main([*excursion, "--out", str(tmp_path / "x")]))
    assert "its digest was 000000000000" in why


def test_alphas_and_match_ask_validation_questions_only_and_write_none_of_it(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    plain = transplants.measured

    def watched(opened: object, evaluation: object, *rest: object, **options: object) -> object:
        asked.extend(evaluation.suites)  # type: ignore[attr-defined]
        return plain(opened, evaluation, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(transplants, "measured", watched)
    assert transplant(runs, tmp_path / "grid", "--alphas", "1,0.5,0") == 0
    tried = json.loads((tmp_path / "grid" / "lineage.json").read_text())["chosen"]
    assert tried["suite"] == "validation"
    assert [one["alpha"] for one in tried["tried"]] == [1, 0.5, 0]
    highest = max(one["pass_at_1"] for one in tried["tried"])
    first = min(one["alpha"] for one in tried["tried"] if one["pass_at_1"] == highest)
    (term,) = json.loads((tmp_path / "grid" / "lineage.json").read_text())["sum"]["terms"]
    assert term["weight"] == first
    trunk = f"{runs / 'trunk'}"
    assert same_bits(
        weights(str(tmp_path / "grid")),
        formula(f"{trunk}@8", (first, str(runs / "one"), f"{trunk}@4")),
    )
    assert transplant(runs, tmp_path / "match", "--match", f"{trunk}@8") == 0
    chosen = json.loads((tmp_path / "match" / "lineage.json").read_text())["chosen"]
    assert abs(chosen["tried"][-1]["marked"] - chosen["marked"]) <= 0.02
    assert len(chosen["tried"]) <= 8
    assert {suite.split for suite in asked} == {"validation"}
    for name in ("grid", "match"):
        assert not (tmp_path / name / "evaluations").exists()


def test_a_trial_in_memory_has_the_weights_that_are_written(runs: Path, tmp_path: Path) -> None:
    """Else α would be chosen for another model."""
    asked = transplants.Asked(
        [str(runs / "one")], f"{runs / 'trunk'}@8", tmp_path / "x", alphas=[0.3]
    )
    transplants.make(asked)
    with megarlx.open(f"{runs / 'trunk'}@8") as run:
        suite = run.config.evaluation.suites[1]
        trial = transplants.Trial(asked.sum, run, suite, "marked", lambda _: None)
        trial(0.3)
        tried = run.model.data_parallel.weights.clone()
    with megarlx.open(str(tmp_path / "x")) as run:
        assert torch.equal(run.model.data_parallel.weights, tried)


def test_python_makes_the_same_sums(runs: Path, tmp_path: Path) -> None:
    one, trunk = str(runs / "one"), str(runs / "trunk")
    assert megarlx.transplant([one], f"{trunk}@8", tmp_path / "made", alpha=0.25)
    assert not megarlx.transplant([one], f"{trunk}@8", tmp_path / "made", alpha=0.25)
    expected = formula(f"{trunk}@8", (0.25, one, f"{trunk}@4"))
    assert same_bits(weights(str(tmp_path / "made")), expected)
    assert megarlx.merge([f"{trunk}@4", f"{trunk}@8"], tmp_path / "mean")
    four, eight = weights(f"{trunk}@4"), weights(f"{trunk}@8")
    mean = {n: (0.5 * four[n].double() + 0.5 * eight[n].double()).float() for n in four}
    assert same_bits(weights(str(tmp_path / "mean")), mean)


def test_a_merge_is_the_shares_sum_beside_the_furthest_checkpoint(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk, made = f"{runs / 'trunk'}", tmp_path / "made"
    merge = ["merge", f"{trunk}@8", f"{trunk}@4", "--out", str(made)]
    assert main([*merge, "--shares", "0.25,0.75"]) == 0
    eight, four = weights(f"{trunk}@8"), weights(f"{trunk}@4")
    mean = {n: (0.25 * eight[n].double() + 0.75 * four[n].double()).float() for n in four}
    assert same_bits(weights(f"{made}@8"), mean)
    with megarlx.open(str(made)) as run:
        assert run.is_base
        assert run.trunk_tokens == 8 * 4 * 128
    x = ["--out", str(tmp_path / "x")]
    for words_, why in {
        ("0.5,0.6",): "whose sum is 1",
        ("0.5",): "--shares has 1 values for 2 checkpoints",
        ("nan,1",): "finite numbers whose sum is 1",
    }.items():
        said = ["merge", f"{trunk}@8", f"{trunk}@4", *x, "--shares", *words_]
        assert why in refusal(capsys, main(said))
    assert "two or more" in refusal(capsys, main(["merge", f"{trunk}@8", *x]))
    other = ["merge", f"{trunk}@8", str(runs / "wide"), *x]
    assert "model.intermediate_size" in refusal(capsys, main(other))
