import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_sweep import SMALL_MODEL, Outcome, Sweep

from megarlx.report import consistency
from megarlx.report.figures_of_runs import readiness
from megarlx.report.runs import ReportError
from megarlx.report.study import BASE, Study
from megarlx.report.summary import summary

ONE = (2_000_000,)


def small(root: Path, **settings: Any) -> Sweep:
    return Sweep(root, **{"checkpoints": ONE, "questions": 40, "tests": 20} | settings)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def by_recipe(study: Study) -> dict[str, dict[str, Any]]:
    rows = summary(study, {})["results"]
    return {row["recipe"]: row for row in rows}


def test_a_cell_for_each_checkpoint_recipe_and_seed(tmp_path: Path) -> None:
    study = Study.of(small(tmp_path, checkpoints=(1_000_000, 2_000_000)).write(["rl", "sft"]))
    places = [(c.checkpoint_tokens, c.recipe, c.seed) for c in study.cells]
    assert places == [
        (tokens, recipe, seed)
        for tokens in (1_000_000, 2_000_000)
        for recipe in ("base", "rl", "sft")
        for seed in (0, 1)
    ]
    assert study.missing() == []


def test_results_have_the_agreed_keys_and_the_files_numbers(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    study = Study.of(sweep.write(["rl"]))
    row = by_recipe(study)["rl"]
    assert list(row) == [
        "checkpoint_tokens",
        "recipe",
        "seed",
        "pass_at_1",
        "pass_at_8",
        "pass_at_32",
        "capability",
        "seconds",
    ]
    run = tmp_path / "excursions" / "rl-2000000-seed0"
    saved = json.loads((run / "evaluations" / "iter_00000060.math.json").read_text())
    assert row["pass_at_32"] == saved["metrics"]["pass_at_32"]
    assert row["capability"] == pytest.approx(0.6)
    assert row["seconds"] == 90.0
    assert by_recipe(study)["base"]["seconds"] == 200.0


@pytest.mark.parametrize("how", ["absolute", "relative to the run", "moved"])
def test_the_parent_is_found(tmp_path: Path, how: str) -> None:
    root = small(tmp_path / "sweep", seeds=(0,)).write(["rl"])
    lineage = root / "excursions" / "rl-2000000-seed0" / "lineage.json"
    if how == "relative to the run":
        parent = json.loads(lineage.read_text())["parent"] | {"run": "../../trunks/seed0"}
        change(lineage, parent=parent)
    if how == "moved":
        root = Path(shutil.move(root, tmp_path / "elsewhere"))
    study = Study.of(root)
    assert study.missing() == []
    (excursion,) = study.of_recipe("rl")
    base = study.base_of(excursion)
    assert base is not None
    assert base.run.name == "trunks/seed0"


def test_a_trunk_that_lies_elsewhere_is_reported_with_its_excursions(tmp_path: Path) -> None:
    root = small(tmp_path / "sweep", seeds=(0,)).write(["rl"])
    shutil.move(root / "trunks", tmp_path / "trunks")
    lineage = root / "excursions" / "rl-2000000-seed0" / "lineage.json"
    parent = json.loads(lineage.read_text())["parent"] | {"run": str(tmp_path / "trunks" / "seed0")}
    change(lineage, parent=parent)
    study = Study.of(root)
    assert study.missing() == []
    (excursion,) = study.of_recipe("rl")
    base = study.base_of(excursion)
    assert base is not None
    assert base.run.name == "../trunks/seed0"


def test_an_excursion_of_an_excursion_is_called_after_both(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    trunk = sweep.trunk(0)
    sft = sweep.excursion(trunk, "sft", ONE[0], 0)
    sweep.excursion(sft, "rl", ONE[0], 0, name="further")
    study = Study.of(tmp_path)
    assert [c.recipe for c in study.cells] == [BASE, "sft", "sft + rl"]
    assert {c.trunk and c.trunk.name for c in study.cells} == {"trunks/seed0"}


def test_runs_that_come_from_each_other_are_refused(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    one = sweep.excursion(tmp_path / "excursions" / "b", "rl", ONE[0], 0, name="a")
    sweep.excursion(one, "rl", ONE[0], 0, name="b")
    with pytest.raises(ReportError, match="is its own ancestor"):
        _ = Study.of(tmp_path).cells


def test_what_a_half_finished_sweep_lacks_is_named_and_the_rest_is_there(tmp_path: Path) -> None:
    root = small(tmp_path, seeds=(0,)).write(["rl", "sft", "parallel", "sft_then_rl"])
    runs = {name: root / "excursions" / f"{name}-2000000-seed0" for name in ("rl", "sft")}
    for file in (runs["rl"] / "evaluations").glob("iter_00000060.*"):
        file.unlink()
    lines = (runs["rl"] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs["rl"] / "metrics.jsonl").write_text("".join(lines[:35]) + '{"step": 36, "lo')
    (runs["sft"] / "evaluations" / "iter_00000060.math.json").unlink()
    gold = root / "excursions" / "parallel-2000000-seed0" / "evaluations"
    (gold / "iter_00000060.math.json").write_text('{"format": 1, "suite"')
    (gold / "iter_00000060.facts-cloze.json").write_text('{"format": 2}')
    study = Study.of(root)
    missing = "\n".join(study.missing())
    for part in (
        "excursions/rl-2000000-seed0: stands at step 35 of 60",
        "excursions/sft-2000000-seed0: no evaluation of math",
        "excursions/parallel-2000000-seed0: no evaluation of math, facts-cloze",
        "iter_00000060.math.json: cannot be used: Expecting",
        "iter_00000060.facts-cloze.json: cannot be used: format is 2; allowed is 1",
    ):
        assert part in missing
    wrong = "\n".join(study.wrong())
    assert "stands at step 35 of 60" in wrong
    assert wrong.count("cannot be used") == 2
    assert "no evaluation" not in wrong  # nothing is there that cannot be used
    rows = by_recipe(study)
    assert rows["rl"]["pass_at_1"] is None  # what it reached half-way is no result
    assert rows["sft"]["pass_at_1"] is None
    assert rows["sft"]["capability"] is not None
    assert rows["sft_then_rl"]["pass_at_32"] > 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "magic"}, 'kind is \'magic\'; allowed are "pass_at_k", "choice"'),
        ({"items": [{"id": "a"}]}, "lacks 'samples'"),
        ({"items": [{"id": "a", "samples": 4, "correct": 5}]}, "correct is 5"),
        ({"metrics": None}, "holds no JSON object"),
        ({"iteration": "soon"}, "invalid literal"),
    ],
)
def test_a_damaged_evaluation_is_named(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    root = small(tmp_path, seeds=(0,)).write(["rl"])
    file = root / "excursions" / "rl-2000000-seed0" / "evaluations" / "iter_00000060.math.json"
    change(file, **values)
    (problem,) = Study.of(root).problems
    assert problem.startswith("excursions/rl-2000000-seed0/evaluations/iter_00000060.math.json: ")
    assert said in problem


def test_a_missing_trunk_is_named(tmp_path: Path) -> None:
    root = small(tmp_path, seeds=(0,)).write(["rl"])
    shutil.rmtree(root / "trunks")
    study = Study.of(root)
    assert any("seed0, is not here" in line for line in study.missing())
    assert by_recipe(study)["rl"]["pass_at_1"] > 0


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="holds no run"):
        Study.of(tmp_path)
    with pytest.raises(ReportError, match="is not a folder"):
        Study.of(tmp_path / "none")


def test_few_shot_evaluations_of_the_base_are_preferred(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    root = sweep.write(["rl"])
    trunk = root / "trunks" / "seed0"
    few_shot = Outcome(0.3, 0.5)
    sweep.evaluate(trunk, 2000, ONE[0], few_shot, 0, only_headline=True, suite="math_few_shot")
    study = Study.of(root)
    assert study.headline == "math"
    assert by_recipe(study)["base"]["pass_at_1"] == pytest.approx(0.3, abs=0.03)


def test_settings_hash_forgets_seeds_and_places_only(tmp_path: Path) -> None:
    def hashed(name: str, **settings: Any) -> str:
        return Study.of(small(tmp_path / name, **settings).write(["rl"])).settings_hash

    first = hashed("a", seeds=(0, 1))
    assert first == hashed("b", seeds=(5, 6, 7))
    assert first != hashed("c", rl_settings={"lr": 1e-3})
    assert first != hashed("d", steps=90)
    assert len(first) == 64


def test_settings_that_differ_tell_runs_apart_where_nothing_else_does(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    trunk = sweep.trunk(0)
    sweep.excursion(trunk, "sft", ONE[0], 0)
    for size in (5, 64):
        sweep.rl_settings = {"samples_per_prompt": size}
        sweep.excursion(trunk, "rl", ONE[0], 0, name=f"rl-{size}")
    labels = [cell.label for cell in Study.of(tmp_path).cells]
    assert labels == ["base", "rl (samples_per_prompt 5)", "rl (samples_per_prompt 64)", "sft"]


def test_trunks_of_one_seed_are_told_apart_by_size_and_data(tmp_path: Path) -> None:
    large = SMALL_MODEL | {"hidden_size": 128}
    small(tmp_path, seeds=(0,), prefix="small-").write(["rl"])
    small(tmp_path, seeds=(0,), prefix="large-", model=large).write(["rl"])
    study = Study.of(tmp_path)
    first, second = (variant.removeprefix("parameters ") for variant in study.variants)
    assert {first[-1], second[-1]} == {"k"}
    assert first != second
    assert {row["trunk"] for row in summary(study, {})["results"]} == set(study.variants)


def test_a_template_is_no_label(tmp_path: Path) -> None:
    """Two converted models differ in their chat templates: their names tell them apart."""
    for name in ("one", "two"):
        sweep = small(tmp_path, seeds=(0,), prefix=f"{name}-")
        sweep.write(["rl"])
        paths = [*tmp_path.glob(f"**/{name}-*/resolved.json")]
        assert len(paths) == 2
        for path in paths:
            settings = json.loads(path.read_text())
            chat = f"{name} {{{{ messages }}}}\n" * 20
            path.write_text(json.dumps({**settings, "template": {"chat": chat, "bos": name}}))
    variants = Study.of(tmp_path).variants
    assert [variant.split("/")[-1] for variant in variants] == ["one-seed0", "two-seed0"]


def test_questions_kept_learned_and_forgotten_are_counted(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,), questions=100)
    sweep.outcomes = {"base": Outcome(0.50, 0.50), "rl": Outcome(0.30, 0.30)}
    study = Study.of(sweep.write(["rl"]))
    found = consistency.of_recipes(study)["rl"]
    assert (found.kept, found.acquired, found.forgotten, found.never) == (30, 0, 20, 50)
    assert (found.retention, found.forgetting) == (0.6, 0.4)
    assert (found.acquisition, found.flip_rate) == (0.0, 0.2)


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (Outcome(0.40, 0.70), "expansion"),
        (Outcome(0.30, 0.30), "sharpening"),
        (Outcome(0.02, 0.30), "both fell"),
        (Outcome(0.20, 0.50), "undetermined"),
    ],
)
def test_sharpening_is_told_from_expansion(tmp_path: Path, outcome: Outcome, kind: str) -> None:
    sweep = small(tmp_path, questions=100)
    sweep.outcomes = {"base": Outcome(0.20, 0.50), "rl": outcome}
    study = Study.of(sweep.write(["rl"]))
    found = consistency.coverage(study.pairs("rl", BASE), (1, 8, 32))
    assert found is not None
    assert (found.k, found.verdict) == (32, kind)


def test_the_probe_before_an_excursion_is_found(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    root = sweep.write(["rl"])
    trunk = root / "trunks" / "seed0"
    probe = "math-readiness"
    sweep.evaluate(trunk, 2000, ONE[0], Outcome(0.2, 0.5), 0, only_headline=True, suite=probe)
    change(
        trunk / "evaluations" / f"iter_00002000.{probe}.json", metrics={"informative_groups": 0.4}
    )
    study = Study.of(root)
    (excursion,) = study.of_recipe("rl")
    found = study.readiness_of(excursion)
    assert found is not None
    assert (found.suite, found.metrics) == (probe, {"informative_groups": 0.4})
    assert study.headline == "math"


def test_a_probe_stands_beside_the_gain_that_followed_where_rl_began(tmp_path: Path) -> None:
    sweep = small(tmp_path, seeds=(0,))
    root = sweep.write(["rl", "sft", "sft_then_rl"])
    for name, step in (("rl", 0), ("sft_then_rl", 20)):
        run = root / "excursions" / f"{name}-{ONE[0]}-seed0"
        given = (run, step, ONE[0], Outcome(0.2, 0.5), 0)
        sweep.evaluate(*given, only_headline=True, suite="rl-readiness")
        change(
            run / "evaluations" / f"iter_{step:08d}.rl-readiness.json",
            metrics={"informative_groups": 0.4, "pass_at_1": 0.2, "pass_at_8": 0.5},
        )
    study = Study.of(root)
    assert study.headline == "math"
    for name, start in (("rl", study.base_of(study.of_recipe("rl")[0])), ("sft_then_rl", None)):
        (cell,) = study.of_recipe(name)
        probe = study.readiness_of(cell)
        assert probe is not None
        before = study.before_rl(cell, probe)
        assert before is not None
        inside = {e.iteration: e for e in cell.run.course("math")}
        assert before is (start.headline if start else inside[20])
    figure = readiness(study)
    assert figure is not None
    rows = {row[0].split("/")[-1].split("-")[0]: row[2:] for row in figure.table[1:]}
    assert rows["rl"][:4] == ["rl-readiness, step 0", "40.0", "20.0", "50.0 (k = 8)"]
    assert rows["sft_then_rl"][0] == "rl-readiness, step 20"
    gains = {name: float(row[4].split()[0]) for name, row in rows.items()}
    assert gains["rl"] == pytest.approx(35, abs=2)
    assert gains["sft_then_rl"] == pytest.approx(23, abs=2)
